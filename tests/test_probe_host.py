"""The host: memory within its control groups, and disks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engine.probe import host
from engine.units import GIB


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


def test_a_disk_is_asked_through_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert host.disk_free_bytes(tmp_path / "not" / "yet") == pytest.approx(host.disk_free_bytes(tmp_path), rel=0.05)


def test_swap_that_cannot_be_read_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> None:
        raise RuntimeError("no sin and sout stats found in '/proc/vmstat'")

    monkeypatch.setattr(psutil, "swap_memory", hidden)
    assert host.snapshot().swap_free_bytes is None
