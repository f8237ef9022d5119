"""Seconds by hand: two clocks, of the device's computing and of its copies, and the host that starts both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.estimate import clock
from engine.estimate.clock import Speeds
from engine.estimate.placements import Casting, GroupOffload, ModelOffload, Placement, Resident, SequentialOffload
from engine.estimate.trace import Builder, Trace, TracedModule, Work
from engine.values import Gpu
from tests import toys
from tests.conftest import RTX_4090, card

MB = 10**6
GROUP_S = 0.1e-3
KERNEL_S = 3e-6

# A megabyte a second in every direction but home, a tenth of a teraflop, and a host that takes no time.
SLOW = Speeds(
    flop_per_s={"float16": 1e11, "float32": 1e11},
    peak_flop_per_s={"float16": 1e11, "float32": 1e11, "convolution": 1e11},
    memory_bytes_per_s=1e6,
    multiprocessors=100,
    capability=(8, 0),
    is_half_rate=False,
    launch_s=0.0,
    to_device_bytes_per_s=1e6,
    to_host_bytes_per_s=0.5e6,
    pinned_bytes_per_s=1e6,
    tensor_fetch_s=0.25,
)


def second(count: float = 1) -> Work:
    """Return work that keeps the device busy for so many seconds, 3 us of them for its kernel's start and end."""
    return Work("memory", "float16", (), int(count * MB) - 3)


def forward(made: Builder, name: str, work: Work) -> None:
    """One forward of a component with two layers, each of which does this work."""
    made.begin(name)
    for layer in (f"{name}.a", f"{name}.b"):
        made.begin(layer)
        made.work(work)
        made.end(layer)
    made.end(name)


def net(layer_bytes: int, forwards: int = 2, work: Work | None = None) -> Trace:
    made = Builder()
    made.phase("denoise")
    for _ in range(forwards):
        forward(made, "unet", work or second())
    layers = [TracedModule(path=f"unet.{n}", weights=(toys.weight(i, layer_bytes),)) for i, n in enumerate("ab")]
    return toys.trace(made, toys.component("unet", *layers))


def seconds(trace: Trace, make: Callable[[], Placement], speed: Speeds = SLOW, steps: int | None = None) -> list[float]:
    return [p.seconds for p in clock.phases(trace, make, speed, steps)]


def test_a_copy_on_a_stream_of_its_own_hides_behind_longer_computing() -> None:
    """0.5 s of copy a layer, 1 s of computing. The first forward learns, and waits for each: (0.5 + 1) x 2 = 3 s.

    A group goes when the host has seen it compute, so that `a` of the second comes from 3 s on, until 3.5. `b` comes
    while `a` computes, until 4.5, and ends at 5.5; four times a group's hooks have cost their time.
    """
    trace = net(MB // 2)
    assert seconds(trace, lambda: GroupOffload(trace)) == pytest.approx([5.5 + 4 * GROUP_S])


def test_a_copy_that_takes_longer_than_the_computing_is_waited_for() -> None:
    """1.5 s of copy a layer, 1 s of computing. The first forward: (1.5 + 1) x 2 = 5 s.

    `a` is then fetched until 6.5 s, and computes until 7.5; `b` is fetched until 8, and computes until 9.
    """
    trace = net(3 * MB // 2)
    assert seconds(trace, lambda: GroupOffload(trace)) == pytest.approx([9.0 + 4 * GROUP_S])


def test_without_a_stream_every_copy_holds_everything_up_both_ways() -> None:
    """Each layer: a copy there of 1 s, 1 s of computing, and a copy back at half the speed: 1 + 1 + 2, four times."""
    trace = net(MB)
    assert seconds(trace, lambda: GroupOffload(trace, use_stream=False)) == pytest.approx([16.0])


def test_under_model_offload_the_predecessor_goes_home_first() -> None:
    """Encode: 1 s of copy, 2 of computing. Denoise: 2 s home at half the speed, 2 s of copy, 2 of computing."""
    made = Builder()
    made.phase("encode")
    forward(made, "text", second())
    made.phase("denoise")
    forward(made, "unet", second())
    text = toys.component("text", TracedModule(path="text.a", weights=(toys.weight(1, MB),)))
    unet = toys.component("unet", TracedModule(path="unet.a", weights=(toys.weight(2, 2 * MB),)))
    trace = toys.trace(made, text, unet)
    assert seconds(trace, lambda: ModelOffload(trace)) == pytest.approx([3.0, 6.0])
    assert seconds(trace, lambda: Resident(trace)) == pytest.approx([2.0, 2.0])


def test_sequential_offload_pays_for_each_tensor_beside_its_bytes() -> None:
    """Two layers of three tensors of 0.1 MB: 6 x (0.1 + 0.25) s, and 2 s of computing."""
    made = Builder()
    made.phase("denoise")
    forward(made, "unet", second())
    layers = [
        TracedModule(path=f"unet.{n}", weights=tuple(toys.weight(10 * i + k, MB // 10) for k in range(3)))
        for i, n in enumerate("ab")
    ]
    trace = toys.trace(made, toys.component("unet", *layers))
    assert seconds(trace, lambda: SequentialOffload(trace)) == pytest.approx([6 * 0.35 + 2])


def test_small_work_waits_for_the_host_that_starts_it() -> None:
    """A hundred launches of 15 us each; what the last of them starts takes the shortest kernel's time."""
    made = Builder()
    made.phase("denoise")
    for _ in range(100):
        made.work(Work("memory", "float16", (), 0))
    trace = toys.trace(made)
    speed = dataclasses.replace(SLOW, launch_s=15e-6)
    assert seconds(trace, lambda: Resident(trace), speed) == pytest.approx([100 * 15e-6 + KERNEL_S])
    # With a host that takes no time the device is what takes it.
    assert seconds(trace, lambda: Resident(trace)) == pytest.approx([100 * KERNEL_S])


def test_a_host_that_reads_a_value_cannot_run_ahead() -> None:
    """A second of work; then a launch of 0.5 s: hidden behind the work, unless a value is read before it."""
    speed = dataclasses.replace(SLOW, launch_s=0.5)
    for read, expected in ((False, 0.5 + 1 + 1), (True, 0.5 + 1 + 0.5 + 1)):
        made = Builder()
        made.phase("denoise")
        made.work(second())
        if read:
            made.work(Work("wait", "", (), 0))
        made.work(second())
        trace = toys.trace(made)
        assert seconds(trace, lambda trace=trace: Resident(trace), speed) == pytest.approx([expected])  # type: ignore[misc]


def test_a_layer_that_is_cast_pays_for_its_bytes_twice() -> None:
    """4 MB of float32 kept as 1 MB and computed as 2: 3 MB moved at the beginning and 3 at the end."""
    made = Builder()
    made.phase("denoise")
    forward(made, "unet", second())
    layer = TracedModule(path="unet.a", weights=(toys.weight(1, 4 * MB),), is_castable=True)
    trace = toys.trace(made, toys.component("unet", layer))
    casting = Casting(storage="float8_e4m3fn", compute="bfloat16")
    assert seconds(trace, lambda: Resident(trace, casting)) == pytest.approx([2 + 3 + 3])


@pytest.mark.parametrize(("steps", "expected"), [(None, 5), (2, 5), (3, 8), (10, 5 + 8 * 3), (1, 2)])
def test_steps_that_were_not_traced_are_like_the_last_that_was(steps: int | None, expected: float) -> None:
    """Traced: a first step of 2 s, a second of 3. The decoding after them, 1 s, is not a step's."""
    made = Builder()
    made.phase("denoise")
    for length in (2, 3):
        made.work(second(length))
        made.step()
    made.phase("decode")
    made.work(second())
    trace = toys.trace(made)
    assert seconds(trace, lambda: Resident(trace), steps=steps) == pytest.approx([expected, 1])


def test_steps_that_are_not_asked_for_are_taken_from_where_they_were() -> None:
    """Three calls for two steps, each in a phase of its own, of 2, 3 and 4 s: two of them go for one step, whole.

    What was encoded between them, 5 s, is no step's.
    """
    made = Builder()
    for phase, length in (("denoise", 2), ("denoise.2", 3), ("encode", 5), ("denoise.3", 4)):
        made.phase(phase)
        made.work(second(length))
        if phase != "encode":
            made.step()
    trace = toys.trace(made)
    assert seconds(trace, lambda: Resident(trace), steps=1) == pytest.approx([2, 0, 5, 0])
    assert seconds(trace, lambda: Resident(trace), steps=3) == pytest.approx([2, 3, 5, 4 + 2 * 4])


def test_where_a_share_of_the_steps_is_taken_that_share_of_the_others_is() -> None:
    """Of the two steps that were asked for one was taken: of ten it will be five."""
    made = Builder()
    made.phase("denoise")
    made.work(second())
    made.step()
    trace = toys.trace(made)
    assert seconds(trace, lambda: Resident(trace), steps=10) == pytest.approx([5])


FAST = dataclasses.replace(SLOW, memory_bytes_per_s=1e12)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # 2 x 1280^3 operations at 1e11 a second; 10 x 10 tiles for 100 multiprocessors
        (Work("matmul", "float16", (1, 1280, 1280, 1280), 0), 2 * 1280**3 / 1e11),
        # 10 x 11 tiles: two waves, of which 1.1 are full
        (Work("matmul", "float16", (1, 1280, 1408, 1280), 0), 2 * 1280 * 1408 * 1280 / 1e11 / (1.1 / 2)),
        # one row of a tile of 128, ten tiles for 100 multiprocessors; and again where bytes take longer than that
        (Work("matmul", "float16", (1, 1, 1280, 10**4), 0), 2 * 1280 * 10**4 / 1e11 * 128 * 10),
        (Work("matmul", "float16", (1, 1280, 1280, 1280), 10**11), 0.1),
        # nothing at all takes the shortest kernel's time, which every kernel takes beside its own
        (Work("matmul", "float16", (1, 0, 1280, 1280), 0), 0),
        (Work("matmul", "float16", (0, 8, 8, 8), 0), 0),
        (Work("group_norm", "float16", (0,), 0), 0),
        # 1.25e9 values a second and group: 32 groups read 0.8e9 bytes in 10 ms, and 1.6e9 are moved in 1.6
        (Work("group_norm", "float16", (32,), 16 * 10**8), 0.010 + 0.0016),
        (Work("group_norm", "float32", (32,), 16 * 10**8), 0.005 + 0.0016),
        # a thousand groups read as fast as the memory lets them
        (Work("group_norm", "float16", (1000,), 16 * 10**8), 0.0008 + 0.0016),
        # flash attention of width 128 on 8.0 reaches 0.72, and the other kernel 0.45
        (Work("attention", "float16", (1, 8, 4096, 4096, 128, 1), 0), 4 * 8 * 4096**2 * 128 / 0.72e11),
        (Work("attention", "float16", (1, 8, 4096, 4096, 64, 1), 0), 4 * 8 * 4096**2 * 64 / 0.6e11),
        (Work("attention", "float16", (1, 8, 4096, 4096, 64, 2), 0), 4 * 8 * 4096**2 * 64 / 0.45e11),
        # 2 x 64 x 32 x 9 operations a pixel out of 16 x 16; transposed, a pixel in of 8 x 8; half of the rate. The bias
        # is added to 32 x 16 x 16 values of two bytes, read and written
        (
            Work("conv", "float16", (1, 64, 32, 1, 0, 16, 16, 3, 3, 1, 1, 1, 1, 16, 16), 0),
            18 * 64 * 32 * 256 / 0.5e11 + 2 * 32 * 256 * 2 / 1e12,
        ),
        (
            Work("conv", "float16", (1, 64, 32, 1, 1, 8, 8, 3, 3, 2, 2, 1, 1, 16, 16), 0),
            18 * 64 * 32 * 64 / 0.5e11 + 2 * 32 * 256 * 2 / 1e12,
        ),
        # 10^6 bytes are moved: as often again for each of two conversions
        (
            Work("conv", "float16", (1, 64, 64, 64, 0, 64, 3, 1, 1, 64), 10**6),
            6 * 64 * 64 / 0.5e11 + 2e-6 + 2 * 64 * 64 * 2 / 1e12,
        ),
    ],
)
def test_work(work: Work, expected: float) -> None:
    assert clock.work_seconds(work, FAST) == pytest.approx(KERNEL_S + expected)


def test_a_wait_is_no_work() -> None:
    assert clock.work_seconds(Work("wait", "", (), 0), FAST) == 0


HOPPER = dataclasses.replace(FAST, capability=(9, 0))


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # tiles of 128 x 256: 10 x 5 of them for 100 multiprocessors; of 128 x 128 in float32, twice as many
        (Work("matmul", "float16", (1, 1280, 1280, 1280), 0), 2 * 1280**3 / 1e11 / 0.5),
        (Work("matmul", "float32", (1, 1280, 1280, 1280), 0), 2 * 1280**3 / 1e11),
        # cuDNN's attention; the memory-efficient kernel, in half precision and as ever in float32
        (Work("attention", "bfloat16", (1, 24, 4608, 4608, 128, 1), 0), 4 * 24 * 4608**2 * 128 / 0.62e11),
        (Work("attention", "float16", (1, 1, 4096, 4096, 512, 2), 0), 4 * 4096**2 * 512 / 0.15e11),
        (Work("attention", "float32", (1, 1, 4096, 4096, 512, 2), 0), 4 * 4096**2 * 512 / 0.45e11),
        # in TF32 0.74 of the rate, in half precision 0.47; a product of planes converts no layout
        (
            Work("conv", "float32", (1, 64, 32, 1, 0, 16, 16, 3, 3, 1, 1, 1, 1, 16, 16), 10**6),
            18 * 64 * 32 * 256 / 0.74e11 + 2e-6 + 2 * 32 * 256 * 4 / 1e12,
        ),
        (
            Work("conv", "float16", (1, 64, 32, 1, 0, 16, 16, 1, 1, 1, 1, 1, 1, 16, 16), 10**6),
            2 * 64 * 32 * 256 / 0.47e11 + 2 * 32 * 256 * 2 / 1e12,
        ),
    ],
)
def test_work_on_hopper(work: Work, expected: float) -> None:
    speed = dataclasses.replace(HOPPER, peak_flop_per_s={"bfloat16": 1e11} | HOPPER.peak_flop_per_s)
    assert clock.work_seconds(work, speed) == pytest.approx(KERNEL_S + expected)


def test_loading_is_the_files_read_and_what_is_resident_copied() -> None:
    """4 GB at 2 GB/s from the disk, and 3 MB at 1 MB/s to the device."""
    assert clock.load_seconds(4 * 10**9, 3 * MB, SLOW) == pytest.approx(2 + 3)


def known(gpu: Gpu, host: str = "value") -> Speeds:
    found = clock.speeds(gpu, host)
    assert found is not None
    return found


def test_a_card_without_rates_has_no_speeds() -> None:
    assert clock.speeds(card()) is None
    assert clock.speeds(dataclasses.replace(card(name=RTX_4090), mig=True)) is None
    assert clock.speeds(dataclasses.replace(card(name=RTX_4090), arch=None)) is None
    clocked = dataclasses.replace(card(), cores=10_000, sm_clock_mhz=2000)
    assert clock.speeds(clocked) is None  # how fast its memory is is not known
    whole = dataclasses.replace(clocked, memory_clock_mhz=10_000, memory_bus_bits=256)
    # 10,000 MHz x 2 transfers x 32 bytes, of which 0.82 are reached
    assert known(whole).memory_bytes_per_s == pytest.approx(0.82 * 640e9)


def test_cards_before_tensor_cores_compute_half_precision_as_float32() -> None:
    pascal = known(card(arch="6.1", name="GeForce GTX 1080 Ti"))
    assert pascal.peak_flop_per_s["float16"] == pascal.peak_flop_per_s["float32"]
    assert pascal.peak_flop_per_s["bfloat16"] == pytest.approx(0.6 * pascal.peak_flop_per_s["float32"])


def test_a_slow_host_takes_longer_to_start_and_to_copy() -> None:
    low, usual, high = (known(card(name=RTX_4090), host) for host in ("low", "value", "high"))
    assert low.launch_s > usual.launch_s > high.launch_s
    assert low.tensor_fetch_s > usual.tensor_fetch_s > high.tensor_fetch_s
    assert low.to_device_bytes_per_s < usual.to_device_bytes_per_s < high.to_device_bytes_per_s
    assert low.to_host_bytes_per_s < usual.to_host_bytes_per_s < high.to_host_bytes_per_s
    assert low.flop_per_s == high.flop_per_s


MAKERS: list[Callable[[Trace], Placement]] = [
    Resident,
    ModelOffload,
    SequentialOffload,
    GroupOffload,
    lambda t: GroupOffload(t, block_level=True),
    lambda t: GroupOffload(t, use_stream=False),
]


@settings(max_examples=150)
@given(toys.traces(), st.sampled_from(MAKERS), st.sampled_from([None, 1, 30]))
def test_a_slow_host_never_ends_before_the_usual_one_nor_that_before_a_fast_one(
    trace: Trace, make: Callable[[Trace], Placement], steps: int | None
) -> None:
    speeds = [known(card(name=RTX_4090), host) for host in ("low", "value", "high")]
    slow, usual, fast = (sum(seconds(trace, lambda: make(trace), s, steps)) for s in speeds)
    assert slow >= usual - 1e-12
    assert usual >= fast - 1e-12
    assert fast >= 0
