"""What was measured of a card: kept whole, used by later plans under the same versions, else dropped with a word."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import api, calibration, paths, validation, versions
from engine.calibration import Calibration, Convolution, Found, Product
from engine.errors import FileError
from engine.estimate import assumed, clock, workspaces
from engine.estimate.trace import Work
from engine.units import MIB
from engine.values import Driver, FrozenDict, Gpu, Hardware
from tests.conftest import RTX_4090, card, machine

ROOT = Path(__file__).parents[1]
DRIVER = Driver(version="580.65.06", cuda="13.0")
CARD = card(name=RTX_4090)
RESIDENT = ["resident"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def made(gpu: Gpu = CARD, **more: Any) -> Calibration:
    """Return a calibration of a card: everything measured, and all of it unlike what is assumed."""
    usual: dict[str, Any] = {
        "uuid": gpu.uuid,
        "name": gpu.name,
        "driver": DRIVER.version,
        "versions": FrozenDict(versions.of_gpu()),
        "when": "2026-10-03T08:09:10Z",
        "took_seconds": 21.5,
        "multiprocessors": 128,
        "context_bytes": 500 * MIB,
        "pinned_to_device_bytes_per_s": 20e9,
        "pinned_to_host_bytes_per_s": 19e9,
        "pageable_to_device_bytes_per_s": 7e9,
        "pageable_to_host_bytes_per_s": 3e9,
        "memory_bytes_per_s": 900e9,
        "launch_seconds": 9e-6,
        "fetch_seconds": 0.2e-3,
        "products": FrozenDict({d: Product(flop_per_s=r, side=8192) for d, r in RATES.items()}),
        "attention_flop_per_s": FrozenDict({"64": 90e12, "128": 110e12, "512": 60e12}),
        "convolutions": tuple(convolution(d, *c) for d in ("bfloat16", "float32") for c in CHANNELS),
    }
    return Calibration(**usual | more)


RATES = {"float16": 140e12, "bfloat16": 150e12, "float32": 60e12}
CHANNELS = ((256, 256), (256, 64), (64, 256))


def convolution(
    dtype: str, channels_in: int, channels_out: int, names: tuple[str, ...] = ("input",), beside: int = 0
) -> Convolution:
    """Return a convolution in whose workspace these tensors were converted."""
    one = Convolution(
        dtype=dtype,
        channels_in=channels_in,
        channels_out=channels_out,
        side_px=512,
        seconds=0.01,
        workspace_bytes=0,
    )
    size = workspaces.converted_bytes(workspaces.work_of(one), names) + beside
    return dataclasses.replace(one, workspace_bytes=size)


def here(*gpus: Gpu, driver: Driver | None = DRIVER) -> Hardware:
    return dataclasses.replace(machine(*(gpus or (CARD,))), driver=driver)


def plan(hardware: Hardware | None = None, **more: Any) -> engine.Plan:
    return engine.resolve(optimizers=RESIDENT, hardware=hardware or here(), **more)


def told(made_plan: engine.Plan) -> list[str]:
    return [n.because for n in made_plan.notes if n.kind == "calibration"]


def schema() -> Any:
    return jsonschema.Draft202012Validator(json.loads(validation.schema_text("calibration")))


rates = st.floats(1, 1e18) | st.none()
calibrations = st.builds(
    made,
    driver=st.text(max_size=8) | st.none(),
    versions=st.fixed_dictionaries({n: st.text(max_size=5) | st.none() for n in ("torch", "cuda", "cudnn")}).map(
        FrozenDict
    ),
    disturbed=st.booleans(),
    context_bytes=st.none() | st.integers(1, 2**40),
    pinned_to_device_bytes_per_s=rates,
    memory_bytes_per_s=rates,
    launch_seconds=st.none() | st.floats(1e-9, 0.9),
    products=st.dictionaries(
        st.sampled_from(sorted(RATES)), st.builds(Product, flop_per_s=st.floats(1, 1e18), side=st.integers(1, 10**5))
    ).map(FrozenDict),
    convolutions=st.just(()) | st.just((convolution("float32", 8, 8),)),
    missing=st.dictionaries(st.text(max_size=5), st.text(max_size=5)).map(FrozenDict),
)


@given(calibrations)
def test_a_calibration_obeys_its_schema_and_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, one: Calibration
) -> None:
    schema().validate(json.loads(one.to_json()))
    path = tmp_path_factory.getbasetemp() / "calibration.json"
    path.write_text(one.to_json(), encoding="utf-8")
    again = calibration.read(path)
    assert again == one
    assert again.digest == one.digest


def test_the_schema_knows_every_field_and_no_other() -> None:
    names = [f.name for f in dataclasses.fields(Calibration)]
    assert schema().schema["required"] == names
    assert list(schema().schema["properties"]) == names


def test_it_is_found_again_under_the_same_driver_and_versions_and_by_its_card_alone() -> None:
    kept = calibration.keep(made())
    assert kept == calibration.path(CARD.uuid or "")
    assert calibration.find(CARD, DRIVER) == Found(calibration=made())
    assert calibration.find(card(index=1), DRIVER) == calibration.NOTHING
    assert calibration.find(dataclasses.replace(CARD, uuid=None), DRIVER) == calibration.NOTHING
    assert calibration.find(None, DRIVER) == calibration.NOTHING


NOW = {"torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": "9.15.1"}


@pytest.mark.parametrize(
    ("driver", "changed", "part"),
    [
        ("590.10", {}, "driver changed from 580.65.06 to 590.10;"),
        (None, {}, "driver changed from 580.65.06 to none;"),
        ("580.65.06", {"torch": "2.14.0+cu130"}, "torch changed from 2.13.0+cu130 to 2.14.0+cu130;"),
        ("580.65.06", {"cuda": "13.2"}, "cuda changed from 13.0 to 13.2;"),
        ("580.65.06", {"cudnn": "9.16.0"}, "cudnn changed from 9.15.1 to 9.16.0;"),
        ("590.10", {"torch": None}, "driver changed from 580.65.06 to 590.10 and torch changed from"),
    ],
)
def test_it_is_dropped_with_a_word_when_the_driver_or_a_version_changed(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, changed: dict[str, Any], part: str
) -> None:
    calibration.keep(made(versions=FrozenDict(NOW)))
    monkeypatch.setattr(versions, "of_gpu", lambda: NOW | changed)
    (because,) = told(dropped := plan(here(driver=Driver(version=driver, cuda="13.0"))))
    assert part in because
    assert "of 2026-10-03 was dropped" in because
    assert "run `dg-run calibrate`" in because
    assert because in dropped.explain()
    assert not dropped.estimate.calibrated
    # It is left where it is: the old driver may come back.
    monkeypatch.setattr(versions, "of_gpu", lambda: NOW)
    assert plan().estimate.calibrated


def document(**more: Any) -> str:
    return json.dumps(json.loads(made().to_json()) | more)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "[" * 100_000, "\x00\xff", made().to_json()[:-20]),
        *(document(schema="dg-run/calibration@2"), document(more=1), document(context_bytes="5"), document(uuid=5)),
        *(document(memory_bytes_per_s=0), document(memory_bytes_per_s=-1), document(launch_seconds=5)),
        *(document(products={"float16": {"flop_per_s": 1e12}}), document(products={"int8": {}}), document(versions={})),
        *(
            document(memory_bytes_per_s=float("nan")),
            document().replace("900000000000.0", "1e999"),
            document(missing=[]),
        ),
        document(convolutions=[{}]),
        "x" * 2_000_000,
    ],
)
def test_a_damaged_file_is_said_to_be_and_ignored(text: str) -> None:
    path = calibration.keep(made())
    path.write_text(text, encoding="latin-1")
    (because,) = told(made_plan := plan())
    assert "is damaged and ignored" in because
    assert "run `dg-run calibrate`" in because
    assert not made_plan.estimate.calibrated
    calibration.keep(made())
    assert plan().estimate.calibrated


def test_a_file_that_is_another_cards_or_no_file_is_ignored() -> None:
    calibration.keep(made())
    other = card(index=1, name=RTX_4090)
    calibration.path(CARD.uuid or "").rename(calibration.path(other.uuid or ""))
    assert "is another card's" in (calibration.find(other, DRIVER).dropped or "")
    calibration.path(CARD.uuid or "").mkdir()
    assert "cannot be read" in (calibration.find(CARD, DRIVER).dropped or "")


def test_a_folder_that_cannot_be_written_is_an_error_in_three_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "file"))
    with pytest.raises(FileError, match="cannot be kept") as caught:
        calibration.keep(made())
    assert "DG_RUN_STATE" in caught.value.do
    assert plan().estimate.required_bytes is not None


def test_two_at_once_and_whoever_reads_meanwhile_sees_one_of_them_whole() -> None:
    both = [made(when=f"2026-10-03T08:09:0{n}Z") for n in (1, 2)]
    calibration.keep(both[0])
    wrong: list[Found] = []

    def write(one: Calibration) -> None:
        for _ in range(100):
            calibration.keep(one)
            found = calibration.find(CARD, DRIVER)
            if found.calibration not in both:
                wrong.append(found)

    threads = [threading.Thread(target=write, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [p.name for p in calibration.folder().iterdir()] == [calibration.path(CARD.uuid or "").name]


@given(st.text())
def test_a_uuid_never_leads_out_of_the_folder(uuid: str) -> None:
    assert calibration.path(f"GPU-{uuid}").parent == calibration.folder()
    assert calibration.path("MIG-GPU-1234/1/0").name == "MIG-GPU-1234_1_0.json"


def test_a_later_plan_uses_it_and_says_so() -> None:
    before = plan()
    calibration.keep(made())
    after = plan()
    assert (before.estimate.calibrated, after.estimate.calibrated) == (False, True)
    assert before.estimate.seconds != after.estimate.seconds
    assert before.digest == after.digest
    assert ", calibrated)" in after.explain()
    assert "not calibrated)" in before.explain()
    assert told(after) == []
    assert engine.Plan.from_json(after.to_json()) == after
    # What is needed differs by the context alone, which is 500 MiB here and 576 elsewhere.
    assert after.estimate.required_bytes is not None
    assert before.estimate.required_bytes is not None
    assert after.estimate.device_bytes is not None
    assert after.estimate.device_bytes == (after.estimate.peak_reserved_bytes or 0) + 500 * MIB


def test_another_calibration_makes_other_answers_and_none_the_old_ones() -> None:
    before = plan().estimate
    calibration.keep(made())
    first = plan().estimate
    calibration.keep(made(launch_seconds=1e-3))
    second = plan().estimate
    assert first.seconds is not None
    assert second.seconds is not None
    assert second.seconds > 2 * first.seconds
    calibration.keep(made())
    assert plan().estimate == first
    calibration.path(CARD.uuid or "").unlink()
    assert plan().estimate == before


def test_a_capped_card_is_the_same_card_and_an_imagined_one_is_none() -> None:
    calibration.keep(made())
    for vram in ("4GiB", "23.5GiB"):  # less than is free, and more
        assert plan(vram=vram).estimate.calibrated
    imagined = plan(gpu="RTX 3090")
    assert imagined.card is not None
    assert imagined.card.hypothetical
    assert not imagined.estimate.calibrated
    assert not plan(here(card(index=1, name=RTX_4090))).estimate.calibrated
    assert told(engine.resolve(device="cpu")) == []


def test_a_disturbed_calibration_is_used_and_told_of() -> None:
    calibration.keep(made(disturbed=True))
    (because,) = told(found := plan())
    assert found.estimate.calibrated
    assert "calibrated while another program computed" in because


WARM = """
import json, sys, engine
from engine.values import Driver, Gpu, Hardware, Host
gpu = Gpu(index=0, name=sys.argv[1], uuid=sys.argv[2], arch="8.9", total_bytes=24 * 2**30, free_bytes=23 * 2**30)
host = Host(ram_bytes=2**35, total_ram_bytes=2**36, cores=8, platform="linux")
seen = Hardware(gpus=(gpu,), host=host, driver=Driver(version=sys.argv[3], cuda="13.0"))
taken = engine.resolve(optimizers=["resident"], hardware=seen).estimate
heavy = {"torch", "numpy", "jsonschema", "filelock"}
print(json.dumps([taken.calibrated, sorted(heavy & set(sys.modules))]))
"""


def test_a_warm_plan_with_a_calibration_imports_neither_torch_nor_jsonschema() -> None:
    calibration.keep(made())
    command = [sys.executable, "-c", WARM, CARD.name, str(CARD.uuid), str(DRIVER.version)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the first validates what it reads, and remembers that it did
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert json.loads(done.stdout) == [True, []]


def test_a_timeline_starts_from_the_measured_context() -> None:
    calibration.keep(made())
    assert api.timeline(plan()).context_bytes == 500 * MIB
    assert api.timeline(plan(gpu="RTX 4090", vram="20GiB", hardware=machine())).context_bytes == 576 * MIB


# What is measured means for a run.


KERNEL_S = 3e-6


def speeds(one: Calibration | None, gpu: Gpu = CARD, host: str = "value") -> clock.Speeds:
    found = clock.speeds(gpu, host, one)
    assert found is not None
    return found


def test_what_was_measured_takes_the_place_of_what_is_assumed_figure_by_figure() -> None:
    """A product of side 8192 has 64 x 64 tiles for 128 multiprocessors: 32 whole waves, so that nothing is idle."""
    found = speeds(made())
    assert found.flop_per_s["bfloat16"] == pytest.approx(150e12)
    assert found.flop_per_s["float32"] == pytest.approx(60e12)
    assert (found.memory_bytes_per_s, found.launch_s, found.tensor_fetch_s) == (900e9, 9e-6, 0.2e-3)
    assert (found.to_device_bytes_per_s, found.to_host_bytes_per_s, found.pinned_bytes_per_s) == (7e9, 3e9, 20e9)
    unknown: dict[str, Any] = {n: None for n in json.loads(made().to_json()) if n.endswith(("_per_s", "_seconds"))}
    unknown |= {"took_seconds": 1.0, "multiprocessors": None, "products": FrozenDict(), "convolutions": ()}
    nothing = made(**unknown | {"attention_flop_per_s": FrozenDict()})
    assert speeds(nothing) == speeds(None)
    assert workspaces.context_bytes((8, 9), made(context_bytes=None)) == workspaces.context_bytes((8, 9))


def test_a_product_whose_last_wave_is_not_full_tells_of_a_higher_rate() -> None:
    """Side 1280: 10 x 10 tiles for 128 multiprocessors, of which 100 computed."""
    one = made(products=FrozenDict(float16=Product(flop_per_s=100e12, side=1280)))
    found = speeds(one)
    assert found.flop_per_s["float16"] == pytest.approx(128e12)
    again = Work("matmul", "float16", (1, 1280, 1280, 1280), 0)
    assert clock.work_seconds(again, found) == pytest.approx(KERNEL_S + 2 * 1280**3 / 100e12)


def test_a_host_that_was_measured_is_neither_slow_nor_fast() -> None:
    low, usual, high = (speeds(made(), host=host) for host in ("low", "value", "high"))
    assert low == usual == high
    partly = [speeds(made(launch_seconds=None), host=host).launch_s for host in ("low", "value", "high")]
    assert partly == sorted(partly, reverse=True)
    assert len(set(partly)) == 3


def test_the_interval_of_an_offloaded_run_narrows_to_what_is_not_measured() -> None:
    def span() -> float:
        taken = engine.resolve(optimizers=["sequential_offload"], hardware=here()).estimate
        return (taken.interval.high_seconds or 0) / (taken.interval.low_seconds or 1)

    wide = span()
    calibration.keep(made())
    assert wide > 3
    assert span() == pytest.approx(1.35 / 0.75, rel=0.01)


@pytest.mark.parametrize(
    ("work", "rate"),
    [
        (Work("attention", "bfloat16", (1, 24, 4608, 4608, 128, 1), 0), 110e12),
        (Work("attention", "float16", (1, 24, 4608, 4608, 64, 1), 0), 90e12),
        (Work("attention", "float16", (1, 1, 16384, 16384, 512, 2), 0), 60e12),
    ],
)
def test_attention_takes_as_long_as_was_measured(work: Work, rate: float) -> None:
    batch, heads, queries, keys, width, _ = work.dims
    expected = 4 * batch * heads * queries * keys * width / rate
    assert clock.work_seconds(work, speeds(made())) == pytest.approx(KERNEL_S + expected)


def test_attention_that_was_not_measured_is_a_share_of_the_peak_as_ever() -> None:
    """With a mask, or in float32."""
    for dtype, kernel in (("float16", 2), ("float32", 1)):
        work = Work("attention", dtype, (1, 24, 4608, 4608, 64, kernel), 0)
        assert clock.work_seconds(work, speeds(made())) == clock.work_seconds(work, speeds(None))


def test_a_convolution_that_was_measured_takes_as_long_as_it_took() -> None:
    """The bytes of its layout's conversion are taken out of the rate, and come back beside it: 10 ms.

    In a model there is a bias to add, which none of those that are measured has.
    """
    for one in made().convolutions:
        if one.channels_in == one.channels_out:
            work = workspaces.work_of(one)
            bias_s = 2 * workspaces.output_bytes(work) / 900e9
            assert clock.work_seconds(work, speeds(made())) == pytest.approx(KERNEL_S + 0.01 + bias_s)


def test_a_convolution_that_only_moved_bytes_tells_of_no_rate() -> None:
    quick = tuple(dataclasses.replace(c, seconds=1e-6) for c in made().convolutions)
    assert speeds(made(convolutions=quick)).convolution_flop_per_s == {}


def test_an_instance_of_mig_has_seconds_once_it_was_measured() -> None:
    """Nobody knows the rates of a slice; its own multiprocessors are told by CUDA."""
    slice_ = dataclasses.replace(CARD, mig=True, name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", arch="8.0")
    assert clock.speeds(slice_) is None
    found = speeds(made(slice_, multiprocessors=14), slice_)
    assert found.multiprocessors == 14
    assert found.flop_per_s["bfloat16"] > 150e12
    assert clock.speeds(slice_, calibration=made(slice_, memory_bytes_per_s=None)) is None
    assert clock.speeds(dataclasses.replace(slice_, arch=None), calibration=made(slice_)) is None
    assert plan(here(slice_)).estimate.seconds is None
    calibration.keep(made(slice_))
    assert plan(here(slice_)).estimate.seconds is not None
    half = {k: v for k, v in made().products.items() if k != "bfloat16"}
    assert speeds(made(slice_, products=FrozenDict(half)), slice_).flop_per_s["bfloat16"] == pytest.approx(140e12)


SETS: list[tuple[str, ...]] = [(), ("input",), ("output",), ("input", "output")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize("beside", [0, MIB])
def test_what_cudnn_converts_is_read_off_its_workspaces(dtype: str, names: tuple[str, ...], beside: int) -> None:
    seen = tuple(convolution(dtype, a, b, names, beside) for a, b in CHANNELS)
    kind = "float32" if dtype == "float32" else "half"
    assert workspaces.seen_converted(seen, kind) == names
    one = made(convolutions=seen)
    work = workspaces.work_of(seen[1])
    expected = workspaces.converted_bytes(work, names)
    assert workspaces.taken(work, (8, 9), calibration=one).bytes == expected
    assert workspaces.converts(kind, (8, 9), one) == names


def test_workspaces_that_no_conversion_explains_leave_it_to_the_capability() -> None:
    unlike = (convolution("float32", 256, 64, ("input",)), convolution("float32", 64, 256, ("output",)))
    large = (convolution("float32", 256, 64, (), 900 * MIB),)
    for seen in (unlike, large, ()):
        assert workspaces.seen_converted(seen, "float32") is None
        assert workspaces.converts("float32", (8, 9), made(convolutions=seen)) == ("input",)


def test_every_figure_is_shown_beside_what_is_assumed_of_the_card() -> None:
    by_name = {row.name: row for row in assumed.rows(CARD, made())}
    context = by_name["CUDA's context"]
    assert (context.measured, context.assumed) == ("0.49 GiB", "0.56 GiB")
    assert context.ratio == pytest.approx(500 / 576)
    assert by_name["pageable to card"].measured == "7 GB/s"
    assert by_name["pageable to card"].ratio == pytest.approx(7 / 4)
    assert by_name["cuDNN converts, half"].measured == "input"
    assert by_name["cuDNN converts, half"].assumed == "input and output"
    assert by_name["products, bfloat16"].measured == "150 TFLOPS"
    assert by_name["attention, width 512"].measured == "60 TFLOPS"
    assert by_name["starting an operator"].measured == "9 us"
    assert [r.measured for r in assumed.rows(CARD, made(fetch_seconds=2.5e-3))][-1] == "2.5 ms"
    bare = {row.name: row for row in assumed.rows(dataclasses.replace(CARD, name="Nobody's", arch=None), made())}
    assert bare["products, bfloat16"].assumed == "not known"
    nothing = made(context_bytes=None, products=FrozenDict(), convolutions=())
    told_of = {row.name: row for row in assumed.rows(CARD, nothing)}
    assert told_of["CUDA's context"].measured == "not measured"
    assert told_of["cuDNN converts, half"].measured == "not known"
    assert told_of["products, float32"].measured == "not measured"
    assert list(told_of) == list(by_name)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"DG_RUN_STATE": "/a"}, "/a"),
        ("linux", {"XDG_STATE_HOME": "/x"}, "/x/dg-run"),
        ("linux", {}, "HOME/.local/state/dg-run"),
        ("darwin", {}, "HOME/Library/Application Support/dg-run"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/dg-run/state"),
    ],
)
def test_where_state_lies(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("DG_RUN_STATE", "XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("engine.paths.sys.platform", platform)
    assert paths.state_dir() == Path(expected.replace("HOME", str(Path.home())))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cuda: Optional[str] = '13.0'\nhip = None\n", "13.0"),
        ('cuda = "12.8"\n', "12.8"),
        ("cuda: Optional[str] = None\n", None),
        ("nothing", None),
    ],
)
def test_torchs_cuda_is_read_and_not_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, expected: str | None
) -> None:
    (tmp_path / "version.py").write_text(text, encoding="utf-8")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec())
    fresh: Callable[[], str | None] = versions.cuda.__wrapped__
    assert fresh() == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fresh() is None
