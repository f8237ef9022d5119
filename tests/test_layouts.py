"""Filters with their channels last: on the live pipeline, and in what is predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import engine
from engine import facts, optimizers
from engine.dryrun import record, run
from engine.errors import IncompatibleError
from engine.estimate import clock, workspaces
from engine.estimate.trace import Trace, Work
from engine.facts import catalogue, convolutions
from engine.optimizers import channels_last
from engine.optimizers.spec import Context, NotApplied, denoisers, is_vae, modules
from engine.values import Request
from tests.conftest import RTX_4090, card, machine
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")
STEP = optimizers.spec("channels_last").step()
CONV = (2, 64, 32, 1, 0, 16, 16, 3, 3, 1, 1, 1, 1, 16, 16)


def drawn(pipe: Any, call: dict[str, Any]) -> Any:
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def strides(pipe: Any) -> list[tuple[int, ...]]:
    return [p.stride() for m in modules(pipe).values() for p in m.parameters()]


def test_filters_are_laid_out_seen_and_taken_back() -> None:
    """In another layout sums have another order: no number of the picture differs by more than 1e-5."""
    pipe, call = pipelines.made("sd")
    before, plain = strides(pipe), drawn(pipe, call)
    with pytest.raises(NotApplied, match="are planar"):
        channels_last.verify(pipe, STEP, HERE)
    assert channels_last.seen(pipe, HERE) is None
    for _ in range(2):
        channels_last.apply(pipe, STEP, HERE)
        told = channels_last.verify(pipe, STEP, HERE)
        assert "convolutions of unet" in told and "convolutions of vae" in told
        assert np.abs(drawn(pipe, call) - plain).max() < 1e-5
    assert "unet" in (channels_last.seen(pipe, HERE) or "")
    pipe.vae.to(memory_format=torch.contiguous_format)
    with pytest.raises(NotApplied, match="convolutions of vae are planar"):
        channels_last.verify(pipe, STEP, HERE)
    channels_last.undo(pipe, STEP, HERE)
    assert strides(pipe) == before
    assert np.array_equal(drawn(pipe, call), plain)


def test_three_dimensional_layers_are_left_as_they_are() -> None:
    pipe, call = pipelines.made("wan")
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    deep = {n: p.stride() for n, p in pipe.vae.named_parameters() if p.dim() == 5}
    channels_last.apply(pipe, STEP, HERE)
    assert {n: p.stride() for n, p in pipe.vae.named_parameters() if p.dim() == 5} == deep
    assert np.abs(pipe(**call, generator=torch.Generator().manual_seed(0)).frames - plain).max() < 1e-4


@pytest.mark.rule("channels-last-needs-convolutions")
def test_what_has_no_such_convolutions_is_known_before_the_run() -> None:
    pipe, _ = pipelines.made("ltx")
    with pytest.raises(IncompatibleError, match="channels_last cannot act on LTXPipeline"):
        channels_last.apply(pipe, STEP, HERE)
    for model, acts in (("Lightricks/LTX-Video", False), (None, True)):
        plan = engine.resolve(model, optimizers=["channels_last"], hardware=machine())
        assert ("channels_last" in {n.optimizer for n in plan.notes if n.kind == "no_effect"}) is not acts


@pytest.mark.parametrize("name", sorted(pipelines.ALL))
def test_which_classes_have_them(name: str) -> None:
    pipe, _ = pipelines.made(name)
    for part, module in modules(pipe).items():
        if part in denoisers(pipe) or is_vae(part):
            own = any(isinstance(m, torch.nn.Conv2d | torch.nn.ConvTranspose2d) for m in module.modules())
            assert convolutions.has_flat(type(module).__name__) in (own, None), type(module).__name__


def test_every_model_of_the_catalogue_is_known() -> None:
    assert {m for m in catalogue.ids() if facts.find(m).convolves_in_2d is None} == set()


def traced(*changes: str) -> Trace:
    request = Request(model="embedded", height=128, width=128, frames=None, batch=1)
    steps = [optimizers.spec(n).step() for n in changes]
    return run.trace(facts.find(None), request, "bfloat16", steps, is_plain=True)


def test_a_dry_run_follows_the_layout() -> None:
    plain, last = traced(), traced("channels_last")
    kinds = [{w.kind for w in t.works if w.kind.startswith("conv")} for t in (plain, last)]
    assert kinds == [{"conv"}, {"conv_last"}]
    assert len(last.works) >= len(plain.works)


def test_a_convolution_gives_what_its_filters_are_laid_out_in() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3, padding=1, device="meta")

        def forward(self, given: Any) -> Any:
            return self.conv(given)

    net = Net()
    channels_last._lay_out([net.conv], torch.channels_last)
    follower = record.follower_of({"net": net}, "cuda")
    given = torch.empty(1, 8, 32, 32, device="meta")
    with torch.no_grad(), follower:
        made = net(given)
    assert made.is_contiguous(memory_format=torch.channels_last) and not made.is_contiguous()
    assert F.conv2d(given, net.conv.weight).is_contiguous()  # as meta has it by itself
    told = follower.builder
    sizes = [e.size_bytes for e in record.trace(_Pipe(), (), follower).told() if e.sign == "+"]
    assert sizes == [given.nbytes, made.nbytes] and told is not None  # the input is copied into the layout


class _Pipe:
    model_cpu_offload_seq = None
    _exclude_from_cpu_offload = ()


def test_nothing_is_converted_that_is_laid_out_already() -> None:
    for dtype, capability in (("bfloat16", (9, 0)), ("float32", (9, 0)), ("float16", (8, 6))):
        plain, last = (workspaces.taken(Work(kind, dtype, CONV, 0), capability) for kind in ("conv", "conv_last"))
        assert last.bytes == 0 <= plain.bytes
    # Four channels of 2 bytes are no whole 16: such a tensor is padded, with its filters.
    latents = (1, 4, 64, 1, 0, 16, 16, 3, 3, 1, 1, 1, 1, 16, 16)
    assert workspaces.taken(Work("conv_last", "bfloat16", latents, 0), (9, 0)).bytes == 2 * (8 * 16**2 + 8 * 64 * 9)


def test_what_is_copied_takes_its_time() -> None:
    speed = clock.speeds(card(name=RTX_4090))
    assert speed is not None
    values = 2 * (64 + 32) * 16**2 + 64 * 32 * 9
    laid, copied = (
        clock.work_seconds(Work("conv_last", "bfloat16", CONV, 2 * values + more), speed) for more in (0, 2**30)
    )
    assert copied - laid == pytest.approx(2**30 / speed.memory_bytes_per_s)
    assert clock.work_seconds(Work("conv", "bfloat16", CONV, 2 * values), speed) > laid


def test_the_estimate_is_of_the_layout() -> None:
    """Of the embedded model's decoder, on a card whose cuDNN converts what is planar."""
    found = [
        engine.resolve(
            optimizers=[*more, {"name": "dtype", "params": {"value": "bfloat16"}}],
            hardware=machine(card(23.0, name="NVIDIA H100 80GB HBM3", arch="9.0")),
            height=512,
            width=512,
        ).estimate
        for more in ([], ["channels_last"])
    ]
    assert found[0] is not None and found[1] is not None
    assert found[0].peak_allocated_bytes != found[1].peak_allocated_bytes
    assert found[1].quality == "exact"
