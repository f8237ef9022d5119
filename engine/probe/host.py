"""The host: how much memory a new process could still take, within the machine and within its control group."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import psutil

from engine import paths
from engine.values import Host

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_SELF_CGROUP = Path("/proc/self/cgroup")


def snapshot() -> Host:
    """Return the host now."""
    memory = psutil.virtual_memory()
    swap = _swap_free_bytes()
    groups = _groups()
    room = cgroup_available_bytes(groups)
    limit = cgroup_limit_bytes(groups)
    return Host(
        ram_bytes=memory.available if room is None else min(memory.available, room),
        total_ram_bytes=memory.total if limit is None else min(memory.total, limit),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        platform=sys.platform,
        swap_free_bytes=swap,
        model_disk_free_bytes=disk_free_bytes(paths.hub_cache_dir()),
        output_disk_free_bytes=disk_free_bytes(Path.cwd()),
    )


def _swap_free_bytes() -> int | None:
    try:
        return int(psutil.swap_memory().free)
    except (OSError, RuntimeError, ValueError):  # a sandbox can hide /proc/vmstat or /proc/swaps
        return None


def disk_free_bytes(folder: Path) -> int | None:
    """Return what is free on the disk where `folder` is, or would be made; None where it cannot be asked."""
    for place in (folder, *folder.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _groups() -> list[Path]:
    """Return this process's memory groups and their ancestors, v2 and v1; empty where there are none."""
    try:
        lines = PROC_SELF_CGROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            root = CGROUP_ROOT
        elif "memory" in controllers.split(","):
            root = CGROUP_ROOT / "memory"
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        if ".." in relative.parts:  # the group lies outside of this namespace
            relative = PurePosixPath()
        here = root / relative
        found += [here, *(a for a in here.parents if a == root or root in a.parents)]
    return found


def _number(path: Path) -> int | None:
    """Return the number in a file; None for "max", for no file, and for anything else."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    # v1 writes "no limit" as a page-aligned number near 2 ** 63.
    return int(text) if text.isdecimal() and len(text) < 19 else None


def _reclaimable_bytes(group: Path) -> int:
    """Return the file cache of a group that the kernel would drop before refusing memory."""
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    stat = {name: value for name, _, value in (line.partition(" ") for line in lines)}
    text = stat.get("inactive_file") or stat.get("total_inactive_file") or "0"
    return int(text) if text.isdecimal() else 0


def cgroup_limit_bytes(groups: Sequence[Path] | None = None) -> int | None:
    """Return the tightest memory limit over the ancestors, or None without one. `groups` are this process's."""
    limits = [_limit(group) for group in (_groups() if groups is None else groups)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(group: Path) -> int | None:
    v2 = _number(group / "memory.max")
    return _number(group / "memory.limit_in_bytes") if v2 is None else v2


def cgroup_available_bytes(groups: Sequence[Path] | None = None) -> int | None:
    """Return what the control groups leave to take, the least over the ancestors; None without a limit."""
    room: list[int] = []
    for group in _groups() if groups is None else groups:
        limit = _limit(group)
        if limit is None:
            continue
        used = _number(group / "memory.current")
        used = _number(group / "memory.usage_in_bytes") if used is None else used
        if used is not None:
            room.append(max(0, limit - used + _reclaimable_bytes(group)))
    return min(room, default=None)
