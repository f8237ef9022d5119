"""What a card and its libraries take and how fast they copy: the measures that a memory model is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.case import host_peaks
from bench.gpu.device import Device
from bench.gpu.sampling import Sampler
from engine import facts, gpus
from engine.estimate import store, workspaces
from engine.estimate.trace import Work
from engine.plan import Plan
from engine.run.load import context
from engine.units import KIB, MIB

COPIED_BYTES = (64 * KIB, MIB, 16 * MIB, 256 * MIB)
_COPYING_S = 0.25
"""How long each kind of copy is repeated."""
MOST_CONVOLUTIONS, MOST_ATTENTIONS = 16, 4
MASKED, _WIDEST = 2, 256
"""The kernel of a work that flash attention does not do, and up to which width that is because of a mask."""
_MOST_ON_CPU_BYTES = MIB
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# What a library or a device has against an operator; an out-of-memory error is a RuntimeError too.
_REFUSALS = (RuntimeError, NotImplementedError, ValueError)


def measured(part: str, device: Device, sampler: Sampler, plan: Plan | None) -> dict[str, Any]:
    """Return one part of the measures. `plan` says which model's convolutions or attentions are meant."""
    told = {"torch": device.description()}
    match part:
        case "card":
            return told
        case "context":
            return told | {"context": list(_context(device, sampler))}
        case "copies":
            return told | {"copies": list(_copies(device))}
        case "edges":
            wanted = [w for w in edges() if device.is_card or w.moved_bytes < _MOST_ON_CPU_BYTES]
            return told | {"convolutions": [_convolution(device, w, device.capability()) for w in wanted]}
    assert plan is not None
    if part == "stream":
        from bench.gpu import allocations

        return told | allocations.measured(device, plan)
    works = _works(plan)
    if part == "convolutions":
        return told | {"convolutions": [_convolution(device, w, _capability(plan)) for w in _largest_convs(works)]}
    card = plan.card
    units = None if card is None else gpus.multiprocessors(card)
    found = [_attention(device, w, _capability(plan), units) for w in _largest_attentions(works)]
    return told | {"attentions": found}


def _context(device: Device, sampler: Sampler) -> Iterator[dict[str, Any]]:
    """Yield what the process holds beside the allocator's bytes, as one library after the other starts."""
    kept: list[Any] = []
    yield {"after": "starting CUDA", "allocated_bytes": 0, "kept_bytes": 0, "reserved_bytes": 0} | _held(sampler)

    def stages() -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "a tensor", lambda: torch.ones(1, device=device.kind)
        half = torch.float16 if device.is_card else torch.float32
        left = torch.ones(1024, 1024, device=device.kind, dtype=half)
        yield "a matrix product", lambda: left @ left
        picture = torch.ones(1, 64, 128, 128, device=device.kind, dtype=half)
        filters = torch.ones(64, 64, 3, 3, device=device.kind, dtype=half)
        yield "a convolution", lambda: F.conv2d(picture, filters, padding=1)
        heads = torch.ones(1, 8, 1024, 64, device=device.kind, dtype=half)
        yield "attention", lambda: F.scaled_dot_product_attention(heads, heads, heads)
        if device.is_card:
            pinned = torch.ones(16 * MIB, dtype=torch.uint8).pin_memory()
            yield "a copy from pinned memory", lambda: pinned.to(device.kind, non_blocking=True)
            for name in ("a second stream's copy", "a third stream's copy"):
                yield name, partial(_copied_aside, pinned, device.kind)

    for name, work in stages():
        before = device.allocated_bytes()
        made = work()
        kept.append(made)
        device.synchronize()
        yield {
            "after": name,
            "allocated_bytes": device.allocated_bytes(),
            "kept_bytes": device.allocated_bytes() - before - _rounded(device, made),
            "reserved_bytes": device.reserved_bytes(),
            **_held(sampler),
        }


def _copied_aside(pinned: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a stream of its own has copied, as group offload does."""
    aside: Any = torch.cuda.Stream  # it has no types
    with torch.cuda.stream(aside()):
        return pinned.to(kind, non_blocking=True)


def _held(sampler: Sampler) -> dict[str, Any]:
    """Return what NVML shows, and the host's memory that this process has."""
    return asdict(sampler.look()) | {"host_anonymous_bytes": host_peaks()["anonymous_bytes"]}


def _copies(device: Device) -> Iterator[dict[str, Any]]:
    """Yield the bandwidths of copies by size, direction and kind of host memory; seconds are those of one copy."""
    for size in COPIED_BYTES:
        on_device = torch.empty(size, dtype=torch.uint8, device=device.kind)
        other = torch.empty_like(on_device)
        yield _copied(device, size, "device to device", None, partial(other.copy_, on_device))
        for pinned in (True, False):
            try:
                started = time.perf_counter()
                on_host = torch.ones(size, dtype=torch.uint8)
                on_host = on_host.pin_memory() if pinned else on_host
                made_s = time.perf_counter() - started
            except _REFUSALS as error:
                yield {"bytes": size, "pinned": pinned, "because": _line(error)}
                continue
            for way, to, of in (("to device", on_device, on_host), ("to host", on_host, on_device)):
                copy = partial(to.copy_, of, non_blocking=pinned)
                yield _copied(device, size, way, pinned, copy) | {"made_s": round(made_s, 6)}
            if not pinned:  # as an offload brings weights back: into pages that nobody has touched yet
                yield _copied(device, size, "to fresh host memory", pinned, partial(on_device.to, "cpu"))


def _copied(device: Device, size: int, way: str, pinned: bool | None, copy: Callable[[], Any]) -> dict[str, Any]:
    copy()
    device.synchronize()
    found: list[float] = []
    until = time.perf_counter() + _COPYING_S
    while time.perf_counter() < until or len(found) < 3:
        started = time.perf_counter()
        copy()
        device.synchronize()
        found.append(time.perf_counter() - started)
    found.sort()
    middle = found[len(found) // 2]
    return {
        "bytes": size,
        "way": way,
        "pinned": pinned,
        "seconds": round(middle, 8),
        "bytes_per_s": round(size / middle),
        "best_bytes_per_s": round(size / found[0]),
        "times": len(found),
    }


def _works(plan: Plan) -> tuple[Work, ...]:
    """Return what the model computes, from its trace."""
    request = plan.request
    trace = store.find(facts.find(request.model), request, context(plan).dtype, is_plain=True)
    assert trace is not None, "torch is here, and a dry run can be made"
    return trace.works


def _capability(plan: Plan) -> tuple[int, int] | None:
    return None if plan.card is None else plan.card.compute_capability


def edges() -> Iterator[Work]:
    """Yield convolutions at the edges of what is known of cuDNN's workspaces."""

    def conv(dtype: str, channels: tuple[int, int], sizes: Sequence[int], kernel: int, **more: int) -> Work:
        batch, groups, stride = more.get("batch", 1), more.get("groups", 1), more.get("stride", 1)
        outs = [(n + 2 * (kernel // 2) - kernel) // stride + 1 for n in sizes]
        each = (sizes, [kernel] * len(sizes), [stride] * len(sizes), [1] * len(sizes), outs)
        dims = (batch, *channels, groups, 0, *(n for one in each for n in one))
        item = getattr(torch, dtype).itemsize
        moved = batch * (channels[0] * math.prod(sizes) + channels[1] * math.prod(outs)) * item
        return Work("conv", dtype, dims, moved)

    for dtype in ("float16", "bfloat16", "float32"):
        for sizes in ((128, 128), (166, 166), (165, 167), (102, 102)):  # planes of whole 16 bytes, 8, and 2
            yield conv(dtype, (512, 256), sizes, 1)
        yield conv(dtype, (512, 512), (128, 128), 1, stride=2)
        yield conv(dtype, (4, 4), (128, 128), 1)
        yield conv(dtype, (8, 8), (128, 128), 1)
        yield conv(dtype, (12, 512), (128, 128), 1)
        yield conv(dtype, (320, 640), (4096,), 1)
        yield conv(dtype, (4, 320), (128, 128), 3)
        yield conv(dtype, (320, 4), (128, 128), 3)
        yield conv(dtype, (3, 128), (512, 512), 3)
        yield conv(dtype, (320, 320), (128, 128), 3, stride=2)
        yield conv(dtype, (320, 320), (128, 128), 3, batch=2)
        yield conv(dtype, (512, 512), (64, 64), 3, groups=2)
        yield conv(dtype, (512, 512), (64, 64), 3, groups=512)
        yield conv(dtype, (3, 1024), (224, 224), 14, stride=14)
        yield conv(dtype, (64, 64), (65536,), 7)
        yield conv(dtype, (96, 96), (8, 128, 128), 3)
        yield conv(dtype, (256, 256), (512, 512), 3, batch=4)
        yield conv(dtype, (100, 100), (256, 256), 3)
    for side in (384, 768, 896, 1152):  # how many tiles are left for the last wave
        yield conv("float32", (256, 256), (side, side), 3)
        yield conv("bfloat16", (256, 256), (side, side), 3)
    for batch in (7, 8):  # 8 x 256 x 1024 x 1024 are 2^31 elements
        yield conv("bfloat16", (256, 256), (1024, 1024), 3, batch=batch)


def _largest_convs(works: tuple[Work, ...]) -> list[Work]:
    convs = [w for w in works if w.kind == "conv"]
    return sorted(convs, key=lambda w: -w.moved_bytes)[:MOST_CONVOLUTIONS]


def _largest_attentions(works: tuple[Work, ...]) -> list[Work]:
    found = {w.dims: w for w in works if w.kind == "attention"}
    return sorted(found.values(), key=lambda w: -math.prod(w.dims[:5]))[:MOST_ATTENTIONS]


def _convolution(device: Device, work: Work, capability: tuple[int, int] | None) -> dict[str, Any]:
    """Return a convolution's workspace and time, beside the predicted workspace."""
    predicted = None if capability is None else workspaces.taken(work, capability).bytes
    told: dict[str, Any] = {"work": _plain(work), "predicted_bytes": predicted}
    batch, channels_in, channels_out, groups, transposed, *rest = work.dims
    per = len(rest) // 5
    size_in, kernel, stride, dilation, size_out = (tuple(rest[i * per : (i + 1) * per]) for i in range(5))
    if transposed:
        return told | {"because": "transposed: not measured"}
    each = list(zip(size_in, kernel, stride, dilation, size_out, strict=True))
    padding = [max(0, -(-((o - 1) * s + d * (k - 1) + 1 - i) // 2)) for i, k, s, d, o in each]
    if any((i + 2 * p - d * (k - 1) - 1) // s + 1 != o for p, (i, k, s, d, o) in zip(padding, each, strict=True)):
        return told | {"because": "padded on one side only: not measured"}
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[per]
    dtype = getattr(torch, work.dtype)
    try:
        given = torch.randn(batch, channels_in, *size_in, device=device.kind, dtype=dtype)
        filters = torch.randn(channels_out, channels_in // groups, *kernel, device=device.kind, dtype=dtype)
        shift = torch.randn(channels_out, device=device.kind, dtype=dtype)

        def run() -> torch.Tensor:
            return convolve(given, filters, shift, stride, padding, dilation, groups)

        return told | _taken(device, run)
    except _REFUSALS as error:
        return told | {"because": _line(error)}


def _attention(device: Device, work: Work, capability: tuple[int, int] | None, units: int | None) -> dict[str, Any]:
    """Return, for each of torch's attention backends, whether it runs, how long it takes and what beside its output."""
    batch, heads, queries, keys, width, kernel = work.dims
    dtype = getattr(torch, work.dtype)
    masked = kernel == MASKED and width <= _WIDEST
    predicted = None if capability is None else workspaces.attention_bytes(work, capability, units)
    found: dict[str, Any] = {"work": _plain(work), "predicted_bytes": predicted, "masked": masked, "backends": {}}
    query = torch.randn(batch, heads, queries, width, device=device.kind, dtype=dtype)
    key = torch.randn(batch, heads, keys, width, device=device.kind, dtype=dtype)

    mask = torch.zeros(1, 1, queries, keys, device=device.kind, dtype=dtype) if masked else None

    def run() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, key, mask)

    for name in ("default", *_BACKENDS):
        try:
            if name == "default":
                found["backends"][name] = _taken(device, run)
            else:
                with sdpa_kernel(_BACKENDS[name]):
                    found["backends"][name] = _taken(device, run)
        except _REFUSALS as error:
            found["backends"][name] = {"because": _line(error)}
        device.empty_cache()
    return found


def _taken(device: Device, run: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Return what an operator holds at its peak beside its inputs and its output, its seconds, and its kernels."""
    device.empty_cache()
    workspaces_bytes = []
    for _ in range(2):  # the first may keep something for good
        device.synchronize()
        before = device.allocated_bytes()
        device.reset_peaks()
        made = run()
        device.synchronize()
        workspaces_bytes.append(device.peaks().allocated_bytes - before - _rounded(device, made))
        del made
    start = device.stamp()
    times = 3
    for _ in range(times):
        run()
    end = device.stamp()
    device.synchronize()
    return {
        "first_bytes": workspaces_bytes[0],
        "bytes": workspaces_bytes[1],
        "seconds": round(device.seconds(start, end) / times, 8),
        "kernels": _kernels(device, run),
    }


def _kernels(device: Device, run: Callable[[], Any]) -> list[str] | None:
    """Return the names of the kernels that ran on the card, in order: they tell which algorithm cuDNN took."""
    if not device.is_card:
        return None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            device.synchronize()
    except RuntimeError:  # a machine where counters are not for everybody
        return None
    return list(dict.fromkeys(e.name[:160] for e in seen.events() or () if str(e.device_type).endswith("CUDA")))


def _rounded(device: Device, made: torch.Tensor) -> int:
    return -(-made.untyped_storage().nbytes() // device.block_bytes) * device.block_bytes


def _plain(work: Work) -> dict[str, Any]:
    return {"kind": work.kind, "dtype": work.dtype, "dims": list(work.dims), "moved_bytes": work.moved_bytes}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
