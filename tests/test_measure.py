"""Measuring: rates checked exactly by a clock that is set, everything once on the CPU, and the command around it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine import calibration, cli, history, versions
from engine.calibration import Calibration
from engine.errors import HardwareError
from engine.estimate import workspaces
from engine.probe import nvml
from engine.run import accelerator, device, lock, measure
from engine.run.measure import NotMeasured, Sizes
from engine.run.progress import Quiet
from engine.values import Gpu
from tests import nvml_stub
from tests.conftest import GIB, RTX_4090, card
from tests.test_calibration import DRIVER, made
from tests.test_history import run as remembered
from tests.test_probe_cards import Show, command, file, libraries, show

__all__ = ["file", "libraries", "show"]  # fixtures

SMALL = Sizes(
    copied_bytes=(2**16,),
    product_sides=(64, 32),
    attention_tokens=(32,),
    wide_tokens=(16,),
    heads=2,
    picture_sides=(16, 8),
    channels=((8, 8), (8, 16)),
    layers=2,
    layer_width=32,
    forwards=2,
)
CARD = card(name=RTX_4090)
UUID = "GPU-4090aaaa-1111-2222-3333-444455556666"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every share of time is spent at once: two times each."""
    monkeypatch.setattr(measure, "_SHARE_S", dict.fromkeys(measure._SHARE_S, 0.0))


class Fake:
    """A device whose clock is set: each call takes the next of `times`, the last one for ever."""

    torch_device = "cpu"

    def __init__(self, *times: float, free_bytes: int = GIB, taken_bytes: int = 0, context: int | None = 5) -> None:
        self.times = list(times) or [1.0]
        self.clock = 0.0
        self.calls = 0
        self.released = 0
        self.free = free_bytes
        self.taken = taken_bytes
        self.context = context

    def now(self) -> float:
        return self.clock

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        taken = self.times[min(self.calls, len(self.times) - 1)]
        self.calls += 1
        self.clock += taken
        return taken

    host_seconds = seconds

    def taken_bytes(self, call: Callable[[], object]) -> int:
        call()
        return self.taken

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        self.released += 1

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def context_bytes(self) -> int | None:
        return self.context

    def multiprocessors(self) -> int | None:
        return 14


def test_the_first_time_does_not_count_and_of_the_others_the_median_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes 9 s. Until 20 s have passed there are four more: 2, 5, 1 and 4 s."""
    fake = Fake(9, 2, 5, 1, 4)
    assert measure.repeated(fake, lambda: None, 20) == 3
    assert fake.calls == 5
    slow = Fake(100, 50)
    assert measure.repeated(slow, lambda: None, 20) == 50
    assert slow.calls == 2
    quick = Fake(1e-6)
    measure.repeated(quick, lambda: None, 20)
    assert quick.calls == measure.MOST_REPEATS + 1
    with pytest.raises(NotMeasured, match="so short a time"):
        measure.repeated(Fake(0), lambda: None, 1)


@pytest.mark.parametrize("name", list(measure._COPIES))
def test_copies(name: str) -> None:
    assert measure.copied(Fake(0.5), (2**16,), name) == 2**16 / 0.5


def test_the_cards_memory_is_read_and_written() -> None:
    assert measure.memory(Fake(0.5), (2**16,)) == 2 * 2**16 / 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_product(dtype: str) -> None:
    assert measure.product(Fake(0.5), (64,), dtype) == calibration.Product(flop_per_s=2 * 64**3 / 0.5, side=64)


def test_attention() -> None:
    """Two products of 32 x 32 x 64 for each of two heads, two operations each."""
    assert measure.attention(Fake(0.5), (32,), 2, 64, "float32") == 4 * 2 * 32 * 32 * 64 / 0.5


def test_a_convolutions_workspace_is_what_was_taken_beside_its_output() -> None:
    """16 channels of 16 x 16 in bfloat16 are 8192 bytes."""
    fake = Fake(0.5, taken_bytes=8192 + 1000)
    first, second = measure.convolutions(fake, (16,), ((8, 16), (8, 64)), "bfloat16")
    assert (first.workspace_bytes, first.seconds, first.side_px) == (1000, 0.5, 16)
    assert second.workspace_bytes == 0
    work = workspaces.work_of(first)
    assert work.dims[:3] == (1, 8, 16)
    assert work.moved_bytes == 2 * (8 * 256 + 16 * 256 + 8 * 16 * 9)


def test_starting_an_operator() -> None:
    """Two forwards of two blocks of 22 operators each: 88.

    Of a block: three norms, three sums, two attentions of four products, one kernel and one scaling, and the
    feed-forward's two products, its activation and what that is multiplied with: 3 + 3 + 2 x 6 + 4.
    """
    assert measure.launch(Fake(9, 8.8), SMALL, "float32") == pytest.approx(0.1)


def test_operators_are_counted_as_a_dry_run_counts_them() -> None:
    given = torch.ones(4, 4)
    assert measure.started(lambda: (given @ given).t().add_(1), "cpu") == 2, "views start nothing"
    with pytest.raises(NotMeasured, match="no operator"):
        measure.started(lambda: given.t(), "cpu")


def test_fetching_a_tensor_by_the_librarys_own_hooks() -> None:
    """Two layers of 32 x 32 and 32 float32: 8,448 bytes, which take 0.8448 s of 1; four tensors share what is left."""
    found = measure.fetch(Fake(9, 1.0), SMALL, "float32", 10_000)
    assert found == pytest.approx((1 - 0.8448) / 4)
    with pytest.raises(NotMeasured, match="vary by"):
        measure.fetch(Fake(9, 0.5), SMALL, "float32", 10_000)
    with pytest.raises(NotMeasured, match="is not known"):
        measure.fetch(Fake(), SMALL, "float32", None)


def test_of_several_sizes_the_first_that_there_is_room_for() -> None:
    """Three matrices of 64 x 64 float32 are 49,152 bytes: no more than half of what is free."""
    assert measure.product(Fake(free_bytes=2 * 49_152), (64, 32), "float32").side == 64
    assert measure.product(Fake(free_bytes=2 * 49_152 - 1), (64, 32), "float32").side == 32
    with pytest.raises(NotMeasured, match="not enough free memory"):
        measure.product(Fake(free_bytes=100), (64, 32), "float32")


def test_a_size_that_runs_out_of_memory_is_followed_by_the_next() -> None:
    tried: list[int] = []

    def attempt(size: int) -> int:
        tried.append(size)
        if size > 10:
            raise torch.OutOfMemoryError("no")
        return size

    fake = Fake()
    assert measure.fitting(fake, (1000, 100, 10, 1), lambda size: size, attempt) == 10
    assert tried == [1000, 100, 10]
    assert fake.released == 2


def whole(fake: Any, told: Any = None, **more: Any) -> Calibration:
    return measure.measure(fake, CARD, DRIVER, told or Quiet(), sizes=SMALL, **more)


def test_all_of_it_becomes_a_calibration_that_can_be_kept() -> None:
    found = whole(Fake(0.5, taken_bytes=10**6), disturbed=True)
    assert found.missing == {}
    assert (found.uuid, found.name, found.driver, found.disturbed) == (CARD.uuid, CARD.name, "580.65.06", True)
    assert found.versions == versions.of_gpu()
    assert set(found.products) == {"float16", "bfloat16", "float32"}
    assert set(found.attention_flop_per_s) == {"64", "128", "512"}
    assert [c.dtype for c in found.convolutions] == ["bfloat16"] * 2 + ["float32"] * 2
    assert (found.context_bytes, found.multiprocessors) == (5, 14)
    assert found.pinned_to_host_bytes_per_s == 2**16 / 0.5
    calibration.keep(found)
    assert calibration.find(CARD, DRIVER).calibration == found


def test_what_torch_has_against_a_measure_is_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.mm

    def no_halves(left: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if left.dtype == torch.bfloat16:
            raise RuntimeError("CUDA error: no kernel image\nmore lines")
        return plain(left, *rest, **more)

    monkeypatch.setattr(torch, "mm", no_halves)
    found = whole(Fake(0.5, context=None))
    assert found.missing["product bfloat16"] == "CUDA error: no kernel image"
    assert "neither the driver nor" in found.missing["context_bytes"]
    assert found.context_bytes is None
    assert set(found.products) == {"float16", "float32"}


def test_when_the_time_is_up_only_the_context_is_still_asked_for() -> None:
    fake = Fake(20.0)
    found = whole(fake, limit_s=45)
    assert fake.clock <= 45 + 2 * 20
    assert found.missing["memory_bytes_per_s"] == "there was no time left for it"
    assert found.context_bytes == 5
    assert found.pinned_to_device_bytes_per_s == 2**16 / 20
    assert found.products == {}


def test_where_nothing_can_be_measured_there_is_an_error_and_nothing_is_kept(state: Path) -> None:
    class Broken(Fake):
        def free_bytes(self) -> int:
            raise RuntimeError("CUDA error: the card fell off the bus")

        host_seconds = seconds = Fake.free_bytes  # type: ignore[assignment]

    with pytest.raises(HardwareError, match="nothing could be measured") as caught:
        whole(Broken(context=None))
    assert "fell off the bus" in caught.value.why
    assert not state.exists()


class Processor(Fake):
    """The CPU of this machine, timed."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    host_seconds = seconds


def test_everything_can_be_measured_on_a_processor() -> None:
    heard: list[str] = []

    class Heard(Quiet):
        def say(self, text: str) -> None:
            heard.append(text)

    found = whole(Processor(), Heard())
    assert set(found.missing) <= {"fetch_seconds"}  # whose bytes are few here
    assert 1e-8 < (found.launch_seconds or 0) < 1e-2
    assert 1e6 < (found.pageable_to_device_bytes_per_s or 0) < 1e13
    assert found.products["float32"].flop_per_s > 1e6
    assert "products in float32 …" in heard


# The adapter's arithmetic, without a card: what torch.cuda and NVML tell is set.


def told_context(
    monkeypatch: pytest.MonkeyPatch, moment: nvml.Moment, reserved: int = 100, *, before: int | None = 1000, alone: bool
) -> int | None:
    monkeypatch.setattr(nvml, "moment", lambda uuid: moment)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    return accelerator.Cuda("GPU-1", before, is_alone=alone).context_bytes()


def test_the_context_is_what_the_driver_says_we_have_beside_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_context(monkeypatch, nvml.Moment(own_bytes=600, free_bytes=0), alone=False) == 500


def test_without_that_it_is_the_free_memory_that_went_when_nobody_else_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a stranger of our number is listed, as can be in a container: with less than our tensors."""
    for own in (None, 50):
        moment = nvml.Moment(own_bytes=own, free_bytes=300)
        assert told_context(monkeypatch, moment, alone=True) == 1000 - 300 - 100
        assert told_context(monkeypatch, moment, alone=False) is None
    assert told_context(monkeypatch, nvml.Moment(free_bytes=950), alone=True) is None
    assert told_context(monkeypatch, nvml.Moment(), alone=True) is None
    assert told_context(monkeypatch, nvml.Moment(free_bytes=300), before=None, alone=True) is None


def idle(**more: Any) -> dict[str, Any]:
    content = nvml_stub.topology("one-idle-card")
    content["cards"][0] |= more
    return content


def test_what_moves_on_a_card_is_told_by_its_uuid(show: Show) -> None:
    show(idle(busy=97, processes={os.getpid(): ["python", 700]}))
    found = nvml.moment(UUID)
    assert found == nvml.Moment(free_bytes=(24564 - 421 - 310) * 2**20, own_bytes=700 * 2**20, busy_percent=97)
    assert nvml.moment("GPU-other") == nvml.Moment()
    show("seven-mig-slices")
    slice_ = nvml.moment("MIG-00000003-1111-2222-3333-444455556666")
    assert slice_ == nvml.Moment(free_bytes=(4864 - 312) * 2**20)
    show({"driver": {"error": 9}})
    assert nvml.moment(UUID) == nvml.Moment()


# The command.


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """CUDA is this machine's processor, and small."""
    asked: list[dict[str, Any]] = []

    def stand_in(uuid: str, free_before_bytes: int | None, *, is_alone: bool) -> Processor:
        asked.append({"uuid": uuid, "free": free_before_bytes, "alone": is_alone})
        return Processor()

    monkeypatch.setattr(accelerator, "Cuda", stand_in)
    monkeypatch.setattr(device, "make_visible", lambda uuid: None)
    monkeypatch.setattr(measure, "Sizes", lambda: SMALL)
    return asked


def calibrate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["calibrate", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_card_is_measured_and_what_changes_is_shown(
    show: Show, on_processor: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    show("one-idle-card")
    before = engine.resolve(optimizers=["resident"])
    code, out, err = calibrate(capsys)
    assert code == 0, err
    assert on_processor == [{"uuid": UUID, "free": (24564 - 421 - 310) * 2**20, "alone": True}]
    assert "warning" not in err
    assert "products in bfloat16 …" in err
    assert "later plans for this card use it" in err
    for word in ("measured", "assumed before", "ratio", "CUDA's context", "products, float32", "0: NVIDIA GeForce RTX"):
        assert word in out
    after = engine.resolve(optimizers=["resident"])
    assert (before.estimate.calibrated, after.estimate.calibrated) == (False, True)
    assert after.estimate.seconds != before.estimate.seconds


def test_as_json_it_is_what_is_kept(
    show: Show, on_processor: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    show("one-idle-card")
    code, out, _ = calibrate(capsys, "--json", "--gpu", "4090")
    assert code == 0
    assert out == calibration.path(UUID).read_text(encoding="utf-8")
    assert json.loads(out)["disturbed"] is False


@pytest.mark.parametrize(
    ("more", "is_disturbed", "part"),
    [
        ({"busy": 97}, True, "is busy 97 % of the time"),
        ({"busy": 97, "processes": {4242: ["/usr/bin/blender", 310]}}, True, "(used by blender)"),
        ({"busy": 3, "processes": {4242: ["/usr/bin/blender", 310]}}, False, ""),
        (
            {"processes": {4242: ["/usr/bin/blender", 310]}},
            True,
            "NVIDIA GeForce RTX 4090 is used by blender, and how busy it is is not told",
        ),
    ],
)
def test_a_busy_card_is_said_to_be_and_remembered_so(
    show: Show,
    on_processor: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    is_disturbed: bool,
    part: str,
) -> None:
    show(idle(**more))
    code, _, err = calibrate(capsys)
    assert code == 0
    assert ("warning: " in err, part in err) == (is_disturbed, True)
    assert json.loads(calibration.path(UUID).read_text(encoding="utf-8"))["disturbed"] is is_disturbed
    assert on_processor[0]["alone"] is False if "processes" in more else True
    notes = [n.because for n in engine.resolve(optimizers=["resident"]).notes if n.kind == "calibration"]
    assert len(notes) == is_disturbed


def test_it_waits_for_whoever_starts_on_the_card(
    show: Show,
    on_processor: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[str | None] = []
    real = lock.held

    def watched(gpu: Gpu, told: Callable[[str], None]) -> Any:
        held.append(gpu.uuid)
        return real(gpu, told)

    monkeypatch.setattr(lock, "held", watched)
    show("one-idle-card")
    assert calibrate(capsys)[0] == 0
    assert held == [UUID]


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("arguments", [(), ("--gpu", "4090"), ("--json",)])
def test_without_a_card_there_is_nothing_to_measure(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    code, out, err = calibrate(capsys, *arguments)
    assert (code, out) == (6, "")
    assert err.splitlines()[0] == "dg-run: there is no card to calibrate"
    assert "  why: no NVIDIA driver was found" in err
    assert "  do:  " in err


@pytest.mark.parametrize(
    ("topology", "arguments", "code", "part"),
    [
        ("mismatch", [], 6, "different versions"),
        ("lost-card", [], 6, "card 1 is lost"),
        ("one-idle-card", ["--gpu", "RTX 3090"], 2, "RTX 3090 is not here"),
        ("one-idle-card", ["--gpu", "Voodoo 9"], 2, "there is no card 'Voodoo 9'"),
        ("one-idle-card", ["--forget", "--json"], 2, "leave one of them out"),
        ("one-idle-card", ["--gpux", "1"], 2, "did you mean '--gpu'?"),
        ({"cards": [{"name": "Nameless", "memory_mib": {"total": 9}}]}, [], 6, "its UUID is not known"),
    ],
)
def test_what_cannot_be_calibrated(
    show: Show,
    on_processor: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    topology: Any,
    arguments: list[str],
    code: int,
    part: str,
) -> None:
    show(topology)
    found, out, err = calibrate(capsys, *arguments)
    assert found == code, err
    assert part in err
    assert out == ""
    assert "  why: " in err or "  do:  " in err
    assert on_processor == []


def test_where_it_cannot_be_kept_is_an_error_of_its_own(
    show: Show,
    on_processor: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DG_RUN_STATE", str(tmp_path / "file"))
    show("one-idle-card")
    code, out, err = calibrate(capsys)
    assert (code, out) == (8, "")
    assert "cannot be kept" in err


def test_what_was_learnt_can_be_forgotten(show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    seen = show("one-idle-card").gpus[0]
    for uuid in (UUID, "GPU-other"):
        calibration.keep(made(uuid=uuid))
        history.remember(uuid, remembered())
    code, out, _ = calibrate(capsys, "--forget", "--gpu", "0")
    assert (code, out) == (0, "dropped the calibrations of 1 card and the remembered runs of 1 card\n")
    assert calibration.find(seen, DRIVER) == calibration.NOTHING
    assert history.read(UUID) == ()
    assert len(history.read("GPU-other")) == 1
    calibration.keep(made())
    code, out, _ = calibrate(capsys, "--forget")
    assert (code, out) == (0, "dropped the calibrations of 2 cards and the remembered runs of 1 card\n")
    assert calibrate(capsys, "--forget")[1] == "nothing was there\n"


def test_a_card_that_torch_cannot_use_is_not_calibrated(
    libraries: dict[bool, Path], file: Callable[[str], Path], state: Path
) -> None:
    """The whole command, in a process of its own. A plan before it and after it is the same."""
    if torch.cuda.is_available():
        pytest.skip("this torch has a card")
    done = command(libraries[False], file("one-idle-card"), "calibrate")
    assert done.returncode == 6, done.stderr
    assert "torch cannot use the card" in done.stderr
    assert "Traceback" not in done.stderr
    assert not calibration.folder().exists()


def test_a_plan_in_another_process_uses_what_was_kept_until_the_driver_changes(
    libraries: dict[bool, Path], file: Callable[[str], Path], tmp_path: Path
) -> None:
    calibration.keep(made(uuid=UUID))
    topology = file("one-idle-card")

    def planned() -> Any:
        done = command(libraries[False], topology, "plan", "--json", "--exact")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert planned()["estimate"]["calibrated"] is True
    changed = topology.read_text(encoding="utf-8").replace("580.65.06", "590.10.01")
    topology.write_text(changed, encoding="utf-8")
    after = planned()
    assert after["estimate"]["calibrated"] is False
    (note,) = [n["because"] for n in after["notes"] if n["kind"] == "calibration"]
    assert "driver changed from 580.65.06 to 590.10.01; run `dg-run calibrate`" in note
    report = command(libraries[False], topology, "doctor")
    assert "driver changed from 580.65.06 to 590.10.01" in report.stdout
    assert UUID not in report.stdout
