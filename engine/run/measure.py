"""Measure a card: what it computes and copies in a second, and what it takes beside tensors.

Everything has its share of the time, and is repeated as often as the share allows; the median counts. Sizes are those
of real models where the card has room for them, and smaller where it has not. What cannot be measured is None, with
the reason: a card that computes no bfloat16 still has a calibration.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from engine import versions
from engine.calibration import Calibration, Convolution, Product
from engine.errors import HardwareError
from engine.optimizers.dtype import resolve_auto
from engine.run.accelerator import Accelerator
from engine.run.progress import Progress
from engine.units import MIB
from engine.values import Driver, FrozenDict, Gpu

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

LIMIT_S = 45.0
"""What has not begun by then is left out: with the start of torch a calibration stays under a minute."""
MOST_REPEATS = 50
_WIDTH = 64
"""Of the blocks in which the start of operators is timed."""
_SHARE_S = {"copies": 0.7, "memory": 0.5, "products": 2.0, "attention": 1.0, "convolutions": 0.7, "host": 0.7}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is computed and copied; of several sizes the first that there is room for."""

    copied_bytes: Sequence[int] = (256 * MIB, 64 * MIB, 16 * MIB)
    product_sides: Sequence[int] = (8192, 4096, 2048, 1024)
    attention_tokens: Sequence[int] = (4608, 2304, 1024)
    wide_tokens: Sequence[int] = (16384, 4096, 1024)
    heads: int = 24
    picture_sides: Sequence[int] = (512, 256, 128)
    channels: Sequence[tuple[int, int]] = ((256, 256), (256, 64), (64, 256))
    layers: int = 16
    layer_width: int = 1024
    forwards: int = 10


class NotMeasured(Exception):
    """Why a figure could not be had."""


def measure(
    device: Accelerator,
    card: Gpu,
    driver: Driver | None,
    told: Progress,
    *,
    disturbed: bool = False,
    sizes: Sizes | None = None,
    limit_s: float = LIMIT_S,
) -> Calibration:
    """Return the calibration of `card`, on which `device` is. Raises: HardwareError, where nothing can be measured."""
    assert card.uuid is not None
    start = device.now()
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, what, attempt in _measures(device, sizes or Sizes(), card, found):
        if name != "context_bytes" and device.now() - start > limit_s:
            missing[name] = "there was no time left for it"
            continue
        told.say(f"{what} …")
        try:
            found[name] = _guarded(attempt)
        except NotMeasured as error:
            missing[name] = str(error)
            told.say(f"  not measured: {error}")
        device.release()
    if not found:
        raise HardwareError(
            f"nothing could be measured on {card.name}",
            next(iter(missing.values())),
            "run `dg-run doctor`; other programs on the card may have to end first",
        )
    return Calibration(
        uuid=card.uuid,
        name=card.name,
        driver=None if driver is None else driver.version,
        versions=FrozenDict(versions.of_gpu()),
        when=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        took_seconds=round(device.now() - start, 1),
        disturbed=disturbed,
        multiprocessors=device.multiprocessors(),
        products=FrozenDict({n[8:]: v for n, v in found.items() if n.startswith("product ")}),
        attention_flop_per_s=FrozenDict({n[10:]: v for n, v in found.items() if n.startswith("attention ")}),
        convolutions=tuple(c for n, v in found.items() if n.startswith("convolutions ") for c in v),
        missing=FrozenDict(missing),
        **{n: v for n, v in found.items() if " " not in n},
    )


def _measures(
    device: Accelerator, sizes: Sizes, card: Gpu, found: dict[str, Any]
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield (name, what is told, the measuring) in order. The context comes last, once its kernels are there."""
    half = resolve_auto(card.compute_capability or (0, 0))
    for name, what in _COPIES.items():
        yield name, f"copies {what}", partial(copied, device, sizes.copied_bytes, name)
    yield "memory_bytes_per_s", "the card's memory", partial(memory, device, sizes.copied_bytes)
    for dtype in ("float16", "bfloat16", "float32"):
        yield f"product {dtype}", f"products in {dtype}", partial(product, device, sizes.product_sides, dtype)
    for width in (64, 128, 512):
        tokens, heads = (sizes.wide_tokens, 1) if width == 512 else (sizes.attention_tokens, sizes.heads)
        attempt = partial(attention, device, tokens, heads, width, half)
        yield f"attention {width}", f"attention over heads of {width}", attempt
    for dtype in (half, "float32"):
        convolve = partial(convolutions, device, sizes.picture_sides, sizes.channels, dtype)
        yield f"convolutions {dtype}", f"convolutions in {dtype}", convolve
    yield "launch_seconds", "how fast the host starts work", partial(launch, device, sizes, half)
    what = "how long sequential offload takes for a tensor"
    # Asked for when its turn comes, and the copies have been measured.
    yield "fetch_seconds", what, lambda: fetch(device, sizes, half, found.get("pageable_to_device_bytes_per_s"))
    yield "context_bytes", "what CUDA itself takes", partial(context, device)


def _guarded(attempt: Callable[[], T]) -> T:
    """Return what an attempt gives. Raises: NotMeasured, for whatever torch has against it."""
    try:
        return attempt()
    except (RuntimeError, ValueError, TypeError, ImportError) as error:  # torch's out-of-memory is a RuntimeError
        raise NotMeasured((str(error).splitlines() or [type(error).__name__])[0][:200]) from None


def repeated(device: Accelerator, call: Callable[[], object], share_s: float) -> float:
    """Return the median seconds of `call`, after a first time that does not count: it loads kernels.

    As often as the share of time allows, once at the least.
    """
    start = device.now()
    device.seconds(call)
    times = [device.seconds(call)]
    while len(times) < MOST_REPEATS and device.now() - start < share_s:
        times.append(device.seconds(call))
    return _sound(statistics.median(times))


def _sound(seconds: float) -> float:
    if seconds <= 0:
        raise NotMeasured("the clock does not tell so short a time")
    return seconds


def fitting(device: Accelerator, sizes: Sequence[int], needs: Callable[[int], int], attempt: Callable[[int], T]) -> T:
    """Return what the first size gives that takes no more than half of what is free, and does not run out of memory."""
    import torch

    for size in sizes:
        if needs(size) > device.free_bytes() // 2:
            continue
        try:
            return attempt(size)
        except torch.OutOfMemoryError:
            pass
        device.release()  # once the error is gone, and with it what its frames hold
    raise NotMeasured("there is not enough free memory on the card")


_COPIES = {
    "pinned_to_device_bytes_per_s": "from pinned memory to the card",
    "pinned_to_host_bytes_per_s": "from the card to pinned memory",
    "pageable_to_device_bytes_per_s": "from other memory to the card",
    "pageable_to_host_bytes_per_s": "from the card to new memory",
}


def copied(device: Accelerator, sizes: Sequence[int], name: str) -> float:
    """Return the bytes a second of one kind of copy."""
    import torch

    def attempt(size: int) -> float:
        here = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
        if name == "pageable_to_host_bytes_per_s":
            # As the libraries do it: into memory that is new each time, whose pages are yet to come.
            return size / repeated(device, lambda: here.to("cpu", copy=True), _SHARE_S["copies"])
        pinned = name.startswith("pinned")
        there = device.pinned(size) if pinned else torch.ones(size, dtype=torch.uint8)
        into, source = (here, there) if "to_device" in name else (there, here)
        return size / repeated(device, lambda: into.copy_(source, non_blocking=pinned), _SHARE_S["copies"])

    return fitting(device, sizes, lambda size: 2 * size, attempt)


def memory(device: Accelerator, sizes: Sequence[int]) -> float:
    """Return the bytes a second that the card reads and writes of its own memory."""
    import torch

    def attempt(size: int) -> float:
        source = torch.zeros(size // 4, dtype=torch.float32, device=device.torch_device)
        into = torch.empty_like(source)
        return 2 * source.nbytes / repeated(device, lambda: into.copy_(source), _SHARE_S["memory"])

    return fitting(device, sizes, lambda size: 2 * size, attempt)


def product(device: Accelerator, sides: Sequence[int], dtype: str) -> Product:
    """Return the rate of a product of two square matrices, and their side."""
    import torch

    kind = getattr(torch, dtype)

    def attempt(side: int) -> Product:
        left, right = (_random(device, (side, side), kind) for _ in range(2))
        into = torch.empty_like(left)
        seconds = repeated(device, lambda: torch.mm(left, right, out=into), _SHARE_S["products"])
        return Product(flop_per_s=2 * side**3 / seconds, side=side)

    return fitting(device, sides, lambda side: 3 * side**2 * kind.itemsize, attempt)


def attention(device: Accelerator, tokens: Sequence[int], heads: int, width: int, dtype: str) -> float:
    """Return the operations a second of attention over so many tokens, as torch chooses its kernel."""
    import torch

    kind = getattr(torch, dtype)

    def attempt(length: int) -> float:
        query, key, value = (_random(device, (1, heads, length, width), kind) for _ in range(3))
        attend = torch.nn.functional.scaled_dot_product_attention
        seconds = repeated(device, lambda: attend(query, key, value), _SHARE_S["attention"])
        return 4 * heads * length**2 * width / seconds

    return fitting(device, tokens, lambda length: 8 * heads * length * width * kind.itemsize, attempt)


def convolutions(
    device: Accelerator, sides: Sequence[int], channels: Sequence[tuple[int, int]], dtype: str
) -> tuple[Convolution, ...]:
    """Return convolutions of planar pictures, as a VAE decodes: how long each takes, and its workspace."""
    import torch

    kind = getattr(torch, dtype)
    most = max(a + b for a, b in channels)

    def one(side: int, channels_in: int, channels_out: int) -> Convolution:
        picture = _random(device, (1, channels_in, side, side), kind)
        filters = _random(device, (channels_out, channels_in, 3, 3), kind)

        def call() -> Tensor:
            made: Tensor = torch.nn.functional.conv2d(picture, filters, padding=1)
            return made

        call()  # the library starts, which takes memory of its own
        out_bytes = channels_out * side**2 * kind.itemsize
        taken = device.taken_bytes(call)
        return Convolution(
            dtype=dtype,
            channels_in=channels_in,
            channels_out=channels_out,
            side_px=side,
            seconds=repeated(device, call, _SHARE_S["convolutions"]),
            workspace_bytes=max(0, taken - out_bytes),
        )

    def attempt(side: int) -> tuple[Convolution, ...]:
        return tuple(one(side, *pair) for pair in channels)

    with torch.no_grad():
        return fitting(device, sides, lambda side: 2 * most * side**2 * kind.itemsize, attempt)


def launch(device: Accelerator, sizes: Sizes, dtype: str) -> float:
    """Return how long the host takes to start one operator, from within the modules that denoisers are made of.

    The tensors are so small that the device never is what takes the time. Bare modules of torch would not do: on the
    host of an H200 they start an operator in 12 to 19 us, and denoisers took 33 to 42.
    """
    import torch
    from diffusers.models.attention import BasicTransformerBlock
    from torch import nn

    kind = getattr(torch, dtype)
    made = (BasicTransformerBlock(_WIDTH, 2, _WIDTH // 2, cross_attention_dim=_WIDTH) for _ in range(sizes.layers))
    blocks = nn.ModuleList(made).eval().to(device.torch_device, kind)
    given, text = (_random(device, (1, tokens, _WIDTH), kind) for tokens in (16, 8))

    def forwards() -> None:
        for _ in range(sizes.forwards):
            hidden = given
            for block in blocks:
                hidden = block(hidden, encoder_hidden_states=text)

    with torch.no_grad():
        count = started(forwards, device.torch_device)
        device.host_seconds(forwards)
        start = device.now()
        times = [device.host_seconds(forwards)]
        while len(times) < MOST_REPEATS and device.now() - start < _SHARE_S["host"]:
            times.append(device.host_seconds(forwards))
    return _sound(statistics.median(times)) / count


def started(call: Callable[[], object], kind: str) -> int:
    """Return how many operators `call` starts on a device of this kind, as a dry run counts them. There is one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from engine.dryrun import works

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts what passes through."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            work = works.of(func, args, kwargs or {}, result, kind)
            if work is not None and work.kind != "wait":
                counted.append(1)
            return result

    counted: list[int] = []
    with Counter():  # type: ignore[no-untyped-call]
        call()
    if not counted:
        raise NotMeasured("no operator was seen to start")
    return len(counted)


def fetch(device: Accelerator, sizes: Sizes, dtype: str, pageable_bytes_per_s: float | None) -> float:
    """Return what a tensor costs under sequential offload beside its bytes, by the very hooks that fetch it."""
    import torch
    from accelerate import cpu_offload
    from torch import nn

    if pageable_bytes_per_s is None:
        raise NotMeasured("how fast its bytes are copied is not known")
    width, kind = sizes.layer_width, getattr(torch, dtype)
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(sizes.layers))).to(kind)
    tensors = list(layers.parameters())
    count, size = len(tensors), sum(t.nbytes for t in tensors)
    del tensors
    cpu_offload(layers, execution_device=torch.device(device.torch_device))
    given = torch.zeros(1, width, dtype=kind)
    with torch.no_grad():
        each = (repeated(device, lambda: layers(given), _SHARE_S["host"]) - size / pageable_bytes_per_s) / count
    if each <= 0:
        raise NotMeasured("it is less than what the copies vary by")
    return each


def context(device: Accelerator) -> int:
    """Return what the process takes on the card beside tensors."""
    found = device.context_bytes()
    if found is None:
        raise NotMeasured("neither the driver nor the free memory tells it")
    return found


def _random(device: Accelerator, shape: tuple[int, ...], kind: Any) -> Tensor:
    """Return a tensor of noise: a card draws less power on zeros, and is faster on them than it ever will be again."""
    import torch

    noise: Tensor = torch.randn(shape, device=device.torch_device, dtype=torch.float32).to(kind)
    return noise
