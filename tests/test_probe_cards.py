"""The cards: the real pynvml against a compiled stub library, driven by topologies."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine import gpus, probe
from engine.errors import HardwareError
from engine.probe import faults
from engine.units import GIB, MIB
from engine.values import Hardware
from tests import nvml_stub

ROOT = Path(__file__).parents[1]
Show = Callable[..., Hardware]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The stub, compiled as today's driver and as an old one."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the stub of the driver's library cannot be built")
    folder = tmp_path_factory.mktemp("nvml")
    return {old: nvml_stub.compile_stub(folder / str(old), old=old) for old in (False, True)}


@pytest.fixture
def show(libraries: dict[bool, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Show:
    """Show this process a topology (by name, or told), and return what the probe makes of it."""
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(variable, raising=False)

    def shown(told: str | dict[str, Any], *, old: bool = False, **environment: str) -> Hardware:
        loaded = ctypes.CDLL(str(libraries[old]))
        loaded.stub_reset()
        monkeypatch.setattr(pynvml, "nvmlLib", loaded)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        file = tmp_path / "topology"
        content = nvml_stub.topology(told) if isinstance(told, str) else told
        file.write_text(nvml_stub.lines(content), encoding="utf-8")
        monkeypatch.setenv("NVML_STUB_FILE", str(file))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return probe.snapshot()

    return shown


def test_one_idle_card(show: Show) -> None:
    seen = show("one-idle-card")
    (gpu,) = seen.gpus
    assert (gpu.index, gpu.name, gpu.arch) == (0, "NVIDIA GeForce RTX 4090", "8.9")
    assert gpu.uuid == "GPU-4090aaaa-1111-2222-3333-444455556666"
    assert (gpu.total_bytes, gpu.reserved_bytes, gpu.used_bytes) == (24564 * MIB, 421 * MIB, 310 * MIB)
    assert gpu.free_bytes == (24564 - 421 - 310) * MIB
    assert (gpu.pcie_generation, gpu.pcie_width, gpu.display_active) == (4, 16, False)
    assert (gpu.mig, gpu.driver_model, gpu.nvlink_links, gpu.processes) == (False, None, 0, ())
    assert dict(gpu.unknown) == {}
    assert seen.driver is not None
    assert (seen.driver.version, seen.driver.cuda) == ("580.65.06", "13.0")
    assert (seen.faults, seen.notes, seen.no_gpu_because) == ((), (), None)


def test_a_real_card_is_seen_as_it_was_on_its_machine(show: Show) -> None:
    """The topology was read off it, and what the probe made of it there is in the records of the GPU harness."""
    (path, *_) = sorted((ROOT / "bench" / "gpu" / "results").glob("h200-*.jsonl"))
    with path.open(encoding="utf-8") as file:
        there: dict[str, Any] = json.loads(next(file))["machine"]["gpu"]
    (gpu,) = show("one-h200").gpus
    for name in there.keys() - {"uuid", "free_bytes", "reserved_bytes", "processes"}:
        assert getattr(gpu, name) == there[name], name
    assert abs((gpu.free_bytes or 0) - there["free_bytes"]) < MIB, "a topology has whole MiB"
    row = gpus.row_of(gpu)
    assert row is not None and row.name == "H200"


def test_who_uses_a_busy_card_is_told_without_folders(show: Show) -> None:
    (gpu,) = show("one-busy-card").gpus
    assert [(p.pid, p.name, p.used_bytes) for p in gpu.processes] == [
        (4242, "blender", 11000 * MIB),
        (5151, None, 6500 * MIB),
    ]
    assert gpu.free_bytes == (24564 - 421 - 18000) * MIB


def test_seven_slices_take_the_place_of_their_card(show: Show) -> None:
    seen = show("seven-mig-slices")
    assert [(g.index, g.mig_instance, g.mig) for g in seen.gpus] == [(0, n, True) for n in range(7)]
    assert [g.uuid for g in seen.gpus] == [f"MIG-0000000{n}-1111-2222-3333-444455556666" for n in range(7)]
    assert seen.gpus[3].total_bytes == 4864 * MIB
    assert seen.gpus[3].used_bytes == 312 * MIB
    assert (seen.gpus[0].arch, seen.gpus[0].cores) == ("8.0", None)
    assert "MIG" in seen.gpus[0].unknown["cores"]
    assert gpus.rates(seen.gpus[0]) is None


def test_a_card_that_is_lost_mid_query_is_a_fault_of_that_card_alone(show: Show) -> None:
    seen = show("lost-card")
    assert [g.name for g in seen.gpus] == ["NVIDIA GeForce RTX 3060"]
    assert [(f.index, f.what) for f in seen.faults] == [(1, "card 1 is lost")]


def test_a_run_stops_beside_a_lost_card_unless_a_good_one_is_named(show: Show) -> None:
    seen = show("lost-card")
    with pytest.raises(HardwareError) as caught:
        engine.resolve(hardware=seen)
    assert caught.value.exit_code == 6
    assert "card 1 is lost" in caught.value.what
    assert "--gpu 0" in caught.value.do
    assert "--device cpu" in caught.value.do
    named = engine.resolve(gpu="3060", hardware=seen)
    assert named.device is not None
    assert named.device.index == 0
    assert engine.resolve(device="cpu", hardware=seen).device is None
    chosen = show("lost-card", CUDA_VISIBLE_DEVICES="GPU-3060")
    assert chosen.faults == ()


def test_an_old_driver_is_asked_the_first_way(show: Show) -> None:
    (gpu,) = show("old-driver", old=True).gpus
    assert (gpu.total_bytes, gpu.free_bytes, gpu.reserved_bytes) == (11178 * MIB, (11178 - 120 - 300) * MIB, None)
    assert gpu.unknown["reserved_bytes"] == "this driver is too old to tell"
    assert gpu.unknown["processes"] == "this driver is too old to tell"
    assert "mig" not in gpu.unknown


def test_wddm_is_said_aloud(show: Show) -> None:
    seen = show("wddm")
    assert seen.gpus[0].driver_model == "WDDM"
    assert [n for n in seen.notes if "spills to host RAM in silence" in n]
    plan = engine.resolve(profile="extreme-low", hardware=seen)
    assert plan.headroom_bytes == GIB
    assert "spills to host RAM in silence" in plan.explain()
    assert [(p.name, p.used_bytes) for p in seen.gpus[0].processes] == [("chrome.exe", None)]


def test_a_part_that_shares_the_hosts_memory_has_the_hosts_sizes(show: Show) -> None:
    seen = show("unified-memory")
    (gpu,) = seen.gpus
    assert gpu.unified_memory
    assert (gpu.total_bytes, gpu.free_bytes) == (seen.host.total_ram_bytes, seen.host.ram_bytes)
    assert gpu.unknown["pcie_width"] == "this card does not tell"


def test_links_between_cards_are_counted(show: Show) -> None:
    seen = show("eight-linked-cards")
    assert [g.nvlink_links for g in seen.gpus] == [18] * 8
    assert [g.index for g in seen.gpus] == list(range(8))


def test_an_unknown_card_is_described_from_its_clocks_and_says_so(show: Show) -> None:
    (gpu,) = show("unknown-card").gpus
    found = gpus.rates(gpu)
    assert found is not None
    assert found.basis.startswith("derived")
    assert found.fp32_flop_per_s == pytest.approx(24576 * 2.7e9 * 2)
    assert found.fp16_flop_per_s == pytest.approx(24576 * 2.7e9 * 4)
    assert found.memory_bytes_per_s == pytest.approx(16e9 * 2 * 64)
    assert found.link_bytes_per_s == pytest.approx(7.563e9 * 16)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (4, "permission denied"),
        (9, "installed and not loaded"),
        (13, "too old"),
        (15, "is lost"),
        (18, "different versions"),
        (999, "NVML says"),
    ],
)
def test_a_driver_that_does_not_start(show: Show, monkeypatch: pytest.MonkeyPatch, code: int, part: str) -> None:
    monkeypatch.setattr(faults, "_card_on_bus", lambda: True)
    seen = show({"driver": {"error": code}})
    (fault,) = seen.faults
    said = f"{fault.what} {fault.why}"
    assert part in said or (code == 9 and "no driver for it is loaded" in said)
    assert "--device cpu" in fault.do
    with pytest.raises(HardwareError):
        engine.resolve(hardware=seen)


def test_no_library_without_a_card_is_nothing_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", _no_library)
    monkeypatch.setattr(faults, "_DEVICE_FILES", ())
    monkeypatch.setattr(faults, "_card_on_bus", lambda: False)
    seen = probe.snapshot()
    assert (seen.gpus, seen.faults, seen.no_gpu_because) == ((), (), faults.NO_DRIVER)
    assert engine.resolve(hardware=seen).device is None


def test_a_container_that_was_given_the_card_without_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", _no_library)
    monkeypatch.setattr(faults, "_DEVICE_FILES", (str(tmp_path / "nvidiactl"),))
    seen = probe.snapshot()
    assert "container" in seen.faults[0].why
    with pytest.raises(HardwareError, match="libnvidia-ml"):
        engine.resolve(hardware=seen)


def _no_library(*_: Any) -> None:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


def test_a_card_on_the_bus_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("a", "0x10de", "0x040300"),
        ("b", "0x8086", "0x030000"),
        ("c", "\x00garbage", "\xff"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor, encoding="utf-8")
        (tmp_path / name / "class").write_text(kind, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(faults, "_PCI", tmp_path)
    assert not faults._card_on_bus()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "vendor").write_text("0x10de\n", encoding="utf-8")
    (tmp_path / "d" / "class").write_text("0x030200\n", encoding="utf-8")
    assert faults._card_on_bus()


SMALL, LARGE = "NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    ("variable", "order", "left"),
    [
        ("0", "PCI_BUS_ID", [SMALL]),
        ("0", "FASTEST_FIRST", [LARGE]),
        ("0", "", [LARGE]),
        ("1", "", [SMALL]),
        ("1,0", "PCI_BUS_ID", [LARGE, SMALL]),
        (" 1 , 0 ", "PCI_BUS_ID", [LARGE, SMALL]),
        ("1gpu", "PCI_BUS_ID", [LARGE]),
        ("+1", "PCI_BUS_ID", [LARGE]),
        ("", "PCI_BUS_ID", []),
        ("-1", "PCI_BUS_ID", []),
        ("0,-1,1", "PCI_BUS_ID", [SMALL]),
        ("7", "PCI_BUS_ID", []),
        ("0,7,1", "PCI_BUS_ID", [SMALL]),
        ("0,0", "PCI_BUS_ID", []),
        ("9" * 5000, "PCI_BUS_ID", []),
        ("\N{ARABIC-INDIC DIGIT ONE}", "PCI_BUS_ID", []),
        ("all", "PCI_BUS_ID", []),
        (",", "PCI_BUS_ID", []),
        ("GPU-4090aaaa-1111-2222-3333-444455556666", "", [LARGE]),
        ("GPU-4090,GPU-3060", "", [LARGE, SMALL]),
        ("GPU-4090,GPU-4090", "", []),
        ("GPU-4090,1", "", [LARGE]),
        ("GPU-", "", []),
        ("GPU-nobody", "", []),
        ("MIG-0000", "", []),
    ],
)
def test_cuda_visible_devices(show: Show, variable: str, order: str, left: list[str]) -> None:
    seen = show("two-unlike-cards", CUDA_VISIBLE_DEVICES=variable, CUDA_DEVICE_ORDER=order)
    assert [g.name for g in seen.gpus] == left
    if not left:
        assert seen.no_gpu_because is not None
        assert "leaves no card" in seen.no_gpu_because
        assert engine.resolve(hardware=seen).device is None
    is_index = variable.strip()[:1] in ("0", "1", "7", "+")
    assert any("unlike" in n for n in seen.notes) is (is_index and order != "PCI_BUS_ID")


def test_slices_are_chosen_by_uuid_and_by_their_cards_index(show: Show) -> None:
    by_uuid = show("seven-mig-slices", CUDA_VISIBLE_DEVICES="MIG-00000004")
    assert [g.mig_instance for g in by_uuid.gpus] == [4]
    by_index = show("seven-mig-slices", CUDA_VISIBLE_DEVICES="0")
    assert [g.mig_instance for g in by_index.gpus] == [0]
    assert show("seven-mig-slices", CUDA_VISIBLE_DEVICES="MIG-").gpus == ()


def test_the_plan_names_the_slice_with_the_most_free_memory(show: Show) -> None:
    seen = show("seven-mig-slices")
    plan = engine.resolve(hardware=seen, headroom="100MiB")
    assert plan.device is not None
    assert plan.device.uuid == "MIG-00000000-1111-2222-3333-444455556666"
    assert plan.card is not None
    assert plan.card.mig_instance == 0
    assert engine.Plan.from_json(plan.to_json()) == plan


def test_cards_that_change_while_they_are_read(show: Show) -> None:
    card = nvml_stub.topology("one-idle-card")["cards"][0]
    gone = show({"driver": {"count": 2}, "cards": [card, {"errors": {"nvmlDeviceGetHandleByIndex": 2}}]})
    assert [g.index for g in gone.gpus] == [0]
    assert "went away" in gone.faults[0].what
    two = f"{nvml_stub.memory({'total': 1000, 'used': 10})}|{nvml_stub.memory({'total': 1000, 'used': 900})}"
    moving = show({"cards": [card | {"raw": {"memory": two}}]})
    assert moving.gpus[0].free_bytes == 990 * MIB  # one moment's sizes, never two moments mixed
    assert moving.gpus[0].used_bytes == 10 * MIB


mib = st.integers(0, 10**6)
cards = st.fixed_dictionaries(
    {
        "name": st.text(
            st.characters(codec="utf-8", exclude_characters="=|!\n\r\x00", exclude_categories=["Cs"]),
            min_size=1,
            max_size=20,
        ).filter(lambda t: t[0] != "!"),
        "memory_mib": st.fixed_dictionaries({"total": mib, "reserved": mib, "used": mib, "free": mib}),
    },
    optional={
        "uuid": st.uuids().map(lambda u: f"GPU-{u}"),
        "capability": st.sampled_from(["6 1", "8 9", "12 0"]),
        "display": st.integers(0, 1),
        "nvlink": st.integers(0, 18),
        "pcie": st.fixed_dictionaries({"generation": st.integers(1, 6), "width": st.sampled_from([1, 4, 8, 16])}),
        "errors": st.dictionaries(
            st.sampled_from(["nvmlDeviceGetName", "nvmlDeviceGetUUID", "memory", "nvmlDeviceGetNumGpuCores"]),
            st.integers(1, 30),
            max_size=2,
        ),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(cards, max_size=6), st.none() | st.text("0123456789,-+GPUMIG ", max_size=12))
def test_any_topology_is_read_without_an_error_and_nothing_unknown_is_zero(
    show: Show, monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]], variable: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = show({"cards": told}, **({} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}))
    assert len(seen.gpus) + len([f for f in seen.faults if f.index is not None]) <= len(told)
    if variable is None:
        assert len(seen.gpus) + len(seen.faults) == len(told)
    for gpu in seen.gpus:
        card = told[gpu.index]
        if gpu.total_bytes is None:
            assert gpu.free_bytes is None
            assert "total_bytes" in gpu.unknown
        elif not gpu.unified_memory:
            assert (gpu.total_bytes, gpu.free_bytes) == (
                card["memory_mib"]["total"] * MIB,
                card["memory_mib"]["free"] * MIB,
            )
        if "uuid" not in card:
            assert (gpu.uuid, "uuid" in gpu.unknown) == (None, True)
    try:
        plan = engine.resolve(hardware=seen)
    except HardwareError:
        assert seen.faults
    else:
        assert engine.Plan.from_json(plan.to_json()) == plan


def command(library: Path, topology: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run dg-run in a process of its own, whose loader finds the stub as a driver's library is found."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    env |= {
        "LD_LIBRARY_PATH": str(library.parent),
        "NVML_STUB_FILE": str(topology),
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "engine", *arguments], capture_output=True, text=True, env=env, check=False
    )


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def written(name: str) -> Path:
        path = tmp_path / name
        path.write_text(nvml_stub.lines(nvml_stub.topology(name)), encoding="utf-8")
        return path

    return written


def test_plan_picks_the_larger_of_two_unlike_cards_by_uuid(
    libraries: dict[bool, Path], file: Callable[[str], Path]
) -> None:
    done = command(libraries[False], file("two-unlike-cards"), "plan", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["device"] == {"uuid": "GPU-4090aaaa-1111-2222-3333-444455556666", "index": 1}
    assert plan["optimizers"][0] == {"name": "dtype", "params": {"value": "bfloat16"}}


@pytest.mark.parametrize("name", [p.stem for p in nvml_stub.TOPOLOGIES.glob("*.yaml")])
def test_doctor_shows_every_topology_on_one_screen(
    libraries: dict[bool, Path], file: Callable[[str], Path], name: str
) -> None:
    topology = nvml_stub.topology(name)
    is_faulty = name in ("lost-card", "mismatch")
    done = command(libraries[name == "old-driver"], file(name), "doctor")
    assert done.returncode == (6 if is_faulty else 0), done.stdout + done.stderr
    assert done.stderr == ""
    for card in topology.get("cards", []):
        assert card["name"] in done.stdout or is_faulty
    assert len(done.stdout.splitlines()) <= 60 or name in ("eight-linked-cards", "seven-mig-slices")
    report = command(libraries[name == "old-driver"], file(name), "doctor", "--json")
    said = json.loads(report.stdout)
    assert len(said["hardware"]["gpus"]) >= (0 if is_faulty else 1)
    for private in ("somebody", "blender", "chrome", "4444-5555", "444455556666"):
        assert private not in report.stdout


def test_a_broken_driver_stops_a_run_with_6_and_the_cpu_is_a_way_out(
    libraries: dict[bool, Path], file: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = command(libraries[False], file("mismatch"), "--auto", "--prompt", "a red circle")
    assert broken.returncode == 6
    assert "different versions" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert command(libraries[False], file("mismatch"), "plan", "--device", "cpu").returncode == 0
    assert command(libraries[False], file("mismatch"), "plan", "--vram", "8GiB").returncode == 0


def test_a_card_that_torch_cannot_use_stops_a_run_with_6(
    libraries: dict[bool, Path], file: Callable[[str], Path], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch has a card")
    place = str(tmp_path / "p.png")
    done = command(libraries[False], file("one-idle-card"), "--auto", "--prompt", "a red circle", "--output", place)
    assert done.returncode == 6, done.stderr
    assert "torch cannot use the card" in done.stderr


def test_a_probe_is_quick(show: Show) -> None:
    """The bound is generous: `make bench` prints the real figure."""
    show("eight-linked-cards")
    start = time.perf_counter()
    probe.snapshot()
    assert time.perf_counter() - start < 1


def test_the_sizes_of_the_table_are_those_of_the_cards(show: Show) -> None:
    seen = show("two-unlike-cards")
    for gpu in seen.gpus:
        row = gpus.row_of(gpu)
        assert row is not None
        assert row.name in gpu.name
        assert gpu.total_bytes is not None
        assert row.memory_gib[0] * GIB == pytest.approx(gpu.total_bytes, rel=0.03)
