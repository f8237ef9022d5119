"""The probe: cards through pynvml (a stand-in for its functions here), and the host within its control groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from engine import probe
from engine.errors import HardwareError
from engine.probe import host, nvml
from engine.units import GIB
from tests.conftest import card


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the functions of the driver behind the real binding."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(count: int = 1, **answers: Any) -> None:
        def memory(handle: int, version: Any = None) -> Any:
            if version is not None and answers.get("old"):
                raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
            return SimpleNamespace(total=24 * GIB, free=(20 - handle) * GIB, used=4 * GIB, reserved=GIB)

        def unsupported(_: int) -> Any:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        functions: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: count,
            "nvmlDeviceGetHandleByIndex": lambda i: i,
            "nvmlDeviceGetName": lambda i: b"NVIDIA Test Card" if answers.get("bytes") else "NVIDIA Test Card",
            "nvmlDeviceGetUUID": lambda i: f"GPU-{i}",
            "nvmlDeviceGetCudaComputeCapability": lambda i: (8, 9),
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetMigMode": unsupported,
        }
        for name, function in (functions | answers.get("functions", {})).items():
            monkeypatch.setattr(pynvml, name, function)

    return install


def fails_with(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise pynvml.NVMLError(code)

    return fail


def test_cards_are_read(driver: Callable[..., None]) -> None:
    driver(count=2)
    gpus, because = nvml.visible_gpus()
    assert because is None
    assert [(g.index, g.uuid, g.arch, g.free_bytes) for g in gpus] == [
        (0, "GPU-0", "8.9", 20 * GIB),
        (1, "GPU-1", "8.9", 19 * GIB),
    ]


def test_an_old_driver_is_asked_the_first_way(driver: Callable[..., None]) -> None:
    driver(old=True, bytes=True)
    ((gpu,), _) = nvml.visible_gpus()
    assert (gpu.name, gpu.total_bytes) == ("NVIDIA Test Card", 24 * GIB)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_a_reason_and_no_error(driver: Callable[..., None], code: int) -> None:
    driver(functions={"nvmlInit": fails_with(code)})
    assert nvml.visible_gpus() == ((), nvml.NO_DRIVER)


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_NO_PERMISSION),
        ("nvmlInit", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH),
        ("nvmlDeviceGetMemoryInfo", pynvml.NVML_ERROR_GPU_IS_LOST),
    ],
)
def test_a_driver_that_is_broken_is_an_error_with_a_remedy(
    driver: Callable[..., None], function: str, code: int
) -> None:
    driver(functions={function: fails_with(code)})
    with pytest.raises(HardwareError) as caught:
        probe.snapshot()
    assert caught.value.exit_code == 6
    assert "--device cpu" in caught.value.do


def test_what_a_card_does_not_tell_is_not_known(driver: Callable[..., None]) -> None:
    unknown = fails_with(pynvml.NVML_ERROR_NOT_SUPPORTED)
    driver(functions={"nvmlDeviceGetMemoryInfo": unknown, "nvmlDeviceGetCudaComputeCapability": unknown})
    ((gpu,), _) = nvml.visible_gpus()
    assert (gpu.total_bytes, gpu.free_bytes, gpu.arch, gpu.compute_capability) == (None, None, None, None)


@pytest.mark.parametrize(
    ("variable", "left"),
    [
        ("0", [0]),
        ("1,0", [1, 0]),
        (" 1 , 0 ", [1, 0]),
        ("", []),
        ("-1", []),
        ("7", []),
        ("0,7,1", [0]),
        ("0,0", [0]),
        ("GPU-00000000-0000-0000-0000-000000000001", [1]),
        ("GPU-00000000-0000-0000-0000-0000000000", []),
        ("GPU-nobody", []),
        ("all", []),
        ("٣", []),
    ],
)
def test_cuda_visible_devices(variable: str, left: list[int]) -> None:
    assert [g.index for g in nvml.visible((card(index=0), card(index=1)), variable)] == left


def test_cards_that_are_hidden_are_said_to_be(driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert nvml.visible_gpus() == ((), nvml.HIDDEN)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Lay out control groups."""

    def install(membership: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (tmp_path / "self").write_text(membership, encoding="utf-8")
        monkeypatch.setattr(host, "CGROUP_ROOT", tmp_path / "cgroup")
        monkeypatch.setattr(host, "PROC_SELF_CGROUP", tmp_path / "self")

    return install


def test_the_tightest_ancestor_counts_and_its_file_cache_is_available(
    groups: Callable[[str, dict[str, str]], None],
) -> None:
    groups(
        "0::/outer/inner\n",
        {
            "outer/memory.max": f"{8 * GIB}\n",
            "outer/memory.current": f"{6 * GIB}\n",
            "outer/memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
            "outer/inner/memory.max": "max\n",
            "outer/inner/memory.current": f"{GIB}\n",
        },
    )
    assert host.cgroup_limit_bytes() == 8 * GIB
    assert host.cgroup_available_bytes() == 5 * GIB


def test_version_one_groups(groups: Callable[[str, dict[str, str]], None]) -> None:
    groups(
        "12:cpu,cpuacct:/x\n9:memory:/job\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/job/memory.limit_in_bytes": f"{4 * GIB}\n",
            "memory/job/memory.usage_in_bytes": f"{GIB}\n",
            "memory/job/memory.stat": f"total_inactive_file {GIB // 2}\n",
        },
    )
    assert host.cgroup_limit_bytes() == 4 * GIB
    assert host.cgroup_available_bytes() == 3 * GIB + GIB // 2


@pytest.mark.parametrize("text", ["", "garbage", "-5", "12 34", "\x00\xff", "9" * 40])
def test_garbage_is_no_limit(groups: Callable[[str, dict[str, str]], None], text: str) -> None:
    groups(f"0::/a\n{text}\n0::/../../x\n", {"a/memory.max": text, "a/memory.current": text, "a/memory.stat": text})
    assert host.cgroup_limit_bytes() is None
    assert host.cgroup_available_bytes() is None


def test_the_host_is_read() -> None:
    seen = host.snapshot()
    assert seen.ram_bytes is not None
    assert 0 < seen.ram_bytes <= psutil.virtual_memory().total
