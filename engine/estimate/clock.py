"""How long a run takes: two clocks, the device's computing and its copies, and the host that starts both. No torch.

An operator takes as long as the slower of its arithmetic and its bytes; the host takes a while to start each, so that
small work on a fast card waits for the host. Copies from pageable memory hold everything up; those on a stream of their
own run beside the computing, as far as the hooks let them. Rates are the card's; the shares of them that are reached
are data with their evidence (`gpus/speeds.json`). What was measured of this very card (`calibration.py`) takes the
place of both, figure by figure.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from engine import gpus
from engine.calibration import Calibration
from engine.estimate import workspaces
from engine.estimate.placements import DROP, EMPTY, FETCH, LOAD, PIN, STAGE, STORE, WAIT, Placement, SequentialOffload
from engine.estimate.trace import BEGIN, END, KIND_BITS, KIND_MASK, NAMED, PHASE, STEP, WORK, Trace, Work
from engine.gpus import Rates
from engine.values import FrozenDict, Gpu

_SPEEDS = Path(__file__).parents[1] / "gpus" / "speeds.json"
_USUAL_LINK_BYTES_PER_S = 16e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What a card on a host does in a second, as this run meets it."""

    flop_per_s: dict[str, float]
    """Dense matrix rates by dtype, as reached on large shapes."""
    peak_flop_per_s: dict[str, float]
    memory_bytes_per_s: float
    multiprocessors: int | None
    capability: tuple[int, int]
    is_half_rate: bool
    launch_s: float
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    pinned_bytes_per_s: float
    tensor_fetch_s: float
    attention_flop_per_s: Mapping[str, float] = field(default_factory=FrozenDict)
    """As measured, by the width of a head; what is not here is a share of the peak."""
    convolution_flop_per_s: Mapping[str, float] = field(default_factory=FrozenDict)
    """As measured, by dtype, without the conversions of layout; what is not here is a share of the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeconds:
    """How long a phase takes, all steps counted."""

    name: str
    seconds: float


@cache
def _data() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_SPEEDS.read_text(encoding="utf-8"))
    return content


def speeds(
    gpu: Gpu, host: str = "value", calibration: Calibration | None = None, *, tf32: bool = False
) -> Speeds | None:
    """Return the speeds of a card on a host that is "low", "value" (usual) or "high"; None where they are not known.

    What was measured of the card is the same on all three: it was measured on the one host there is. With `tf32`
    products of float32 are computed so: at a share of the table's rate, since a calibration measures none, and None
    where the table has none.
    """
    assumed = _assumed(gpu, host)
    found = assumed if calibration is None else _measured(gpu, host, assumed, calibration)
    if found is None or not tf32:
        return found
    rates = gpus.rates(gpu)
    if rates is None or not rates.tf32_flop_per_s:
        return None
    rate = rates.tf32_flop_per_s * _matmul_share(found.is_half_rate)
    return replace(found, flop_per_s=found.flop_per_s | {"float32": rate})


def _assumed(gpu: Gpu, host: str) -> Speeds | None:
    """Return the speeds of a card nobody measured: shares of its table's rates."""
    rates = gpus.rates(gpu)
    if rates is None or rates.fp32_flop_per_s is None or not rates.memory_bytes_per_s or gpu.compute_capability is None:
        return None
    row = gpus.row_of(gpu)
    peak = _peaks(rates, gpu.compute_capability)
    is_half_rate = _is_half_rate(gpu)
    shares = _data()["matmul_share"]
    return Speeds(
        flop_per_s={
            dtype: rate * (shares["float32"]["value"] if rate == rates.fp32_flop_per_s else _matmul_share(is_half_rate))
            for dtype, rate in peak.items()
        },
        peak_flop_per_s=peak,
        memory_bytes_per_s=rates.memory_bytes_per_s * _data()["memory_share"]["value"],
        multiprocessors=row.multiprocessors if row is not None else None,
        capability=gpu.compute_capability,
        is_half_rate=is_half_rate,
        **_host_speeds(host, rates.link_bytes_per_s),
    )


def _is_half_rate(gpu: Gpu) -> bool:
    row = gpus.row_of(gpu)
    name = row.name if row is not None else gpu.name
    return any(family in name for family in _data()["half_rate_families"])


def _matmul_share(is_half_rate: bool) -> float:
    return float(_data()["matmul_share"]["half_rate" if is_half_rate else "full_rate"]["value"])


def _host_speeds(host: str, link_bytes_per_s: float | None) -> dict[str, Any]:
    """Return what depends on the host: how fast it starts work and copies, over a link of this speed."""
    data = _data()
    link = link_bytes_per_s or _USUAL_LINK_BYTES_PER_S
    times = {"low": "high", "high": "low", "value": "value"}[host]  # a slow host takes long
    return {
        "launch_s": float(data["launch_s"][times]),
        "to_device_bytes_per_s": min(float(data["pageable_to_device_bytes_per_s"][host]), link),
        "to_host_bytes_per_s": min(float(data["pageable_to_host_bytes_per_s"][host]), link),
        "pinned_bytes_per_s": link * data["pinned_share"]["value"],
        "tensor_fetch_s": float(data["tensor_fetch_s"][times]),
    }


def _measured(gpu: Gpu, host: str, assumed: Speeds | None, found: Calibration) -> Speeds | None:
    """Return the speeds of a card that was measured, with what is assumed in the place of what was not.

    A card whose rates nobody knows (an instance of MIG, a card outside the table) has speeds by its products and its
    memory alone; None where these were not measured either.
    """
    base = assumed
    if base is None:
        if gpu.compute_capability is None or found.memory_bytes_per_s is None or "float32" not in found.products:
            return None
        link = gpus.link_bytes_per_s(gpu.pcie_generation, gpu.pcie_width)
        base = Speeds(
            flop_per_s={},
            peak_flop_per_s={},
            memory_bytes_per_s=found.memory_bytes_per_s,
            multiprocessors=found.multiprocessors,
            capability=gpu.compute_capability,
            is_half_rate=_is_half_rate(gpu),
            **_host_speeds(host, link),
        )
    multiprocessors = found.multiprocessors or base.multiprocessors
    # A product of this size left some multiprocessors idle at its end, as any product does.
    whole = replace(base, multiprocessors=multiprocessors)
    rates = {d: p.flop_per_s / _fill(1, p.side, p.side, d, whole) for d, p in found.products.items()}
    peak = dict(base.peak_flop_per_s)
    if assumed is None:
        plain = rates["float32"]
        half = rates.get("float16", plain)
        rates = {"float16": half, "bfloat16": rates.get("bfloat16", half), "convolution": plain} | rates
        # What is computed as a share of the peak needs one: the peak of which a product reaches its usual share.
        peak = {d: r / _matmul_share(base.is_half_rate) for d, r in rates.items()}
    memory = found.memory_bytes_per_s or base.memory_bytes_per_s
    return replace(
        whole,
        flop_per_s=base.flop_per_s | rates,
        peak_flop_per_s=peak,
        memory_bytes_per_s=memory,
        launch_s=found.launch_seconds or base.launch_s,
        to_device_bytes_per_s=found.pageable_to_device_bytes_per_s or base.to_device_bytes_per_s,
        to_host_bytes_per_s=found.pageable_to_host_bytes_per_s or base.to_host_bytes_per_s,
        pinned_bytes_per_s=found.pinned_to_device_bytes_per_s or base.pinned_bytes_per_s,
        tensor_fetch_s=found.fetch_seconds or base.tensor_fetch_s,
        attention_flop_per_s=found.attention_flop_per_s,
        convolution_flop_per_s=_convolution_rates(found, memory),
    )


def _convolution_rates(found: Calibration, memory_bytes_per_s: float) -> dict[str, float]:
    """Return the rates of the convolutions that were measured, by dtype.

    A convolution of planar tensors is timed with its conversions of layout, and `work_seconds` adds those: they are
    taken out here as they are added there. Where hardly anything is left, the rate is not known.
    """
    rates: dict[str, list[float]] = {}
    for one in found.convolutions:
        work = workspaces.work_of(one)
        computing = one.seconds - 2 * work.moved_bytes / memory_bytes_per_s
        if one.channels_in == one.channels_out and computing > one.seconds / 4:
            rates.setdefault(one.dtype, []).append(_conv_flop(work) / computing)
    return {dtype: statistics.median(several) for dtype, several in rates.items()}


def _peaks(rates: Rates, capability: tuple[int, int]) -> dict[str, float]:
    """Return the matrix rates by dtype, as torch computes: float16 on float32 units before there were tensor cores."""
    fp32 = rates.fp32_flop_per_s or 0.0
    half = rates.fp16_flop_per_s if capability >= (7, 0) and rates.fp16_flop_per_s else fp32
    brain = rates.bf16_flop_per_s or fp32 * 0.6  # before Ampere it is emulated
    # torch lets convolutions, and not products, compute float32 in TF32 (torch.backends.cudnn.allow_tf32).
    convolution = rates.tf32_flop_per_s or fp32
    return {"float16": half, "bfloat16": brain, "float32": fp32, "convolution": convolution}


def work_seconds(work: Work, speed: Speeds) -> float:
    """Return how long the device is busy with one operator."""
    moving: float = work.moved_bytes / speed.memory_bytes_per_s
    shortest: float = float(_data()["kernel_s"]["value"])
    return 0.0 if work.kind == "wait" else shortest + _busy(work, speed, moving)


def _busy(work: Work, speed: Speeds, moving: float) -> float:
    """Return the seconds of an operator's kernels at work, `moving` being those of its bytes alone."""
    data = _data()
    rate = speed.flop_per_s.get(work.dtype, speed.flop_per_s["float32"])
    peak = speed.peak_flop_per_s.get(work.dtype, speed.peak_flop_per_s["float32"])
    match work.kind:
        case "matmul":
            batch, m, n, k = work.dims
            return max(2 * batch * m * n * k / (rate * _fill(batch, m, n, work.dtype, speed)), moving)
        case "attention":
            batch, heads, queries, keys, width, kernel = work.dims
            measured = speed.attention_flop_per_s.get(_attention_column(width, kernel, work.dtype, speed))
            reached = measured or peak * _attention(width, kernel, work.dtype, speed)
            return 4 * batch * heads * queries * keys * width / reached
        case "conv":
            # Layouts are converted before and after, and the bias is added by a kernel of its own.
            around = 0 if workspaces.is_product(work, speed.capability) else 2 * moving
            around += 2 * workspaces.output_bytes(work) / speed.memory_bytes_per_s
            return _conv_flop(work) / convolution_rate(work.dtype, speed) + around
        case "conv_last":
            # What torch copies into the layout, and the bias.
            copying = work.moved_bytes - workspaces.values_of(work) * _item_bytes(work.dtype)
            around = max(0, copying) + 2 * workspaces.output_bytes(work)
            return _conv_flop(work) / convolution_rate(work.dtype, speed) + around / speed.memory_bytes_per_s
        case "group_norm":
            # The reduction runs in one block a group; then all is read again and written.
            per_group = float(data["group_norm_values_per_s_a_group"]["value"]) * _item_bytes(work.dtype)
            reading = work.moved_bytes / 2 / min(max(1, work.dims[0]) * per_group, speed.memory_bytes_per_s)
            return reading + moving
    return moving


def _is_hopper(speed: Speeds) -> bool:
    """Whether a card has the matrix units of 9.0 or 10.0: those of 12.0 are of the kind of 8.9 again."""
    return (9, 0) <= speed.capability < (12, 0) and not speed.is_half_rate


def _item_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _fill(batch: int, m: int, n: int, dtype: str, speed: Speeds) -> float:
    """Return the share of multiprocessors that a product's tiles keep busy."""
    if not speed.multiprocessors or not batch * m * n:
        return 1.0
    tile = _data()["matmul_tile"]
    if _is_hopper(speed) and dtype != "float32":
        tile = tile["9.0"]
    tiles = batch * math.ceil(m / tile["rows"]) * math.ceil(n / tile["columns"])
    # Tiles that are only begun compute nothing in their margin.
    begun = (m / tile["rows"] / math.ceil(m / tile["rows"])) * (n / tile["columns"] / math.ceil(n / tile["columns"]))
    waves = tiles / speed.multiprocessors
    return float(begun * waves / math.ceil(waves))


def _attention_column(width: int, kernel: int, dtype: str, speed: Speeds) -> str:
    """Return under which width an attention was measured, if any was: in half precision, without a mask."""
    if dtype not in ("float16", "bfloat16"):
        return ""
    if width > 256:
        return "512"
    # Where cuDNN's kernel is preferred it is what was measured, and not one that was named in its place.
    is_another = kernel > NAMED and workspaces.cudnn_attends(speed.capability)
    return "" if kernel % NAMED != 1 or is_another else "64" if width <= 64 else "128"


def _attention(width: int, kernel: int, dtype: str, speed: Speeds) -> float:
    shares = _data()["attention_share"]
    if kernel % NAMED != 1 or width > 256:
        # Float32 is computed on units that are as they were.
        return float(shares["efficient"]["9.0" if _is_hopper(speed) and dtype != "float32" else "value"])
    column = "64" if width <= 64 else "128"
    if speed.is_half_rate:
        return float(shares["half_rate"][column])
    if kernel <= NAMED and workspaces.cudnn_attends(speed.capability):
        return float(shares["cudnn"][column])
    return float(shares["9.0" if speed.capability >= (9, 0) else "8.0"][column])


def convolution_rate(dtype: str, speed: Speeds) -> float:
    """Return the operations a second of a convolution, without the conversions of layout around it."""
    if measured := speed.convolution_flop_per_s.get(dtype):
        return measured
    plain = speed.peak_flop_per_s["float32"]
    peak = speed.peak_flop_per_s["convolution"] if dtype == "float32" else speed.peak_flop_per_s.get(dtype, plain)
    return peak * _convolution(dtype, speed)


def _convolution(dtype: str, speed: Speeds) -> float:
    shares = _data()["convolution_share"]
    if speed.is_half_rate:
        return float(shares["half_rate"]["value"])
    if _is_hopper(speed):
        return float(shares["9.0"]["float32" if dtype == "float32" else "half"])
    return float(shares["full_rate"]["value"])


def _conv_flop(work: Work) -> int:
    batch, channels_in, channels_out, groups, is_transposed = work.dims[:5]
    per_dimension = (len(work.dims) - 5) // 5
    where = work.dims[5 : 5 + per_dimension] if is_transposed else work.dims[-per_dimension:]
    kernel = math.prod(work.dims[5 + per_dimension : 5 + 2 * per_dimension])
    return 2 * batch * channels_in * channels_out // groups * kernel * math.prod(where)


def phases(trace: Trace, make: Callable[[], Placement], speed: Speeds, steps: int | None) -> tuple[PhaseSeconds, ...]:
    """Return the seconds of each phase. Steps beyond those traced are taken to be like the last of them.

    So are steps that were traced and are not asked for.
    """
    placement = make()
    taking = [work_seconds(w, speed) for w in trace.works]
    waits = [w.kind == "wait" for w in trace.works]
    paths = trace.paths
    acts = [placement.acts_on(p) or p in placement.casts for p in paths]
    is_sequential = isinstance(placement.inner, SequentialOffload)
    group_s = float(_data()["group_s"]["value"])
    host = device = copies = 0.0
    found: list[list[Any]] = []
    began = 0.0
    traced: list[tuple[int, float]] = []  # the phase a step is in, and how long it took there
    ended = 0.0
    is_loading = False

    def now() -> float:
        return max(host, device)

    for word in trace.events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == WORK:
            if waits[payload]:
                host = now()
            else:
                host += speed.launch_s
                device = max(device, host) + taking[payload]
        elif kind == PHASE:
            if found:
                found[-1][1] += now() - began
            began = now()
            found.append([trace.phases[payload], 0.0])
        elif kind == STEP:
            traced.append((len(found) - 1, now() - max(began, ended)))
            ended = now()
        elif kind in (BEGIN, END) and acts[payload]:
            path = paths[payload]
            casts = placement.casts.get(path, ())
            moves = placement.begin(path) if kind == BEGIN else placement.end(path)
            if casts:
                # To the wider kind, and back: read and written, one tensor after the other.
                moved = sum(c.stored_bytes + c.computed_bytes for c in casts)
                host += speed.launch_s * len(casts)
                device = max(device, host) + moved / speed.memory_bytes_per_s
            for move in moves:
                size = placement.bytes_of(move.slots)
                if move.verb == STAGE:
                    is_loading = not is_loading
                elif move.verb == LOAD:
                    if is_loading:  # between the stages of a run: it is among the seconds of loading
                        continue
                    host = device = now() + size / speed.to_device_bytes_per_s
                    if is_sequential:
                        host = device = now() + speed.tensor_fetch_s * len(move.slots)
                elif move.verb == PIN:
                    # The host copies, once the copies before are through: as fast as it does for a pageable transfer.
                    host = max(host, copies) + size / speed.to_device_bytes_per_s
                elif move.verb == FETCH:
                    host = max(host, copies) + group_s
                    copies = max(host, copies) + size / speed.pinned_bytes_per_s
                elif move.verb == STORE:
                    host = device = now() + size / speed.to_host_bytes_per_s
                elif move.verb == WAIT:
                    host = max(host, copies)
                    device = max(device, copies)
                elif move.verb == DROP and copies:
                    host = now()  # the host waits for the device before it lets go
                elif move.verb == EMPTY:
                    host = now()
    if found:
        found[-1][1] += now() - began
    _repeat(found, traced, steps, trace.asked_steps)
    return tuple(PhaseSeconds(name=name, seconds=seconds) for name, seconds in found)


def _repeat(found: list[list[Any]], traced: list[tuple[int, float]], steps: int | None, asked: int) -> None:
    """Add the steps that were not traced, each as long as the last that was; take away those that are not asked for.

    A scheduler may be called more often than once a step, all but the first time; from a picture a share of the steps
    is taken. Where no call was seen at all the whole of denoising is repeated.
    """
    if steps is None or steps == asked:
        return
    if not traced:
        for entry in found:
            if entry[0].startswith("denoise"):
                entry[1] *= steps / asked
        return
    calls = len(traced)
    more = (steps - asked) * -(-calls // asked) if calls >= asked else round(calls * steps / asked) - calls
    if more < 0:
        for phase, one in traced[more:]:
            found[phase][1] = max(0.0, found[phase][1] - one)
        return
    phase, one = traced[-1]
    found[phase][1] += more * one


def load_seconds(stored_bytes: int, resident_bytes: int, speed: Speeds) -> float:
    """Return how long loading takes: the files read, and what is resident copied to the device."""
    return stored_bytes / float(_data()["disk_bytes_per_s"]["value"]) + resident_bytes / speed.to_device_bytes_per_s
