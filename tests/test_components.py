"""A run that stops: what stands in for it, and what it says of what stopped it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import engine
from engine import facts
from engine.dryrun import build, run
from engine.errors import ModelError
from engine.estimate import dryrunner, store, tracefile
from engine.estimate.trace import Trace
from engine.facts.model import Model
from engine.values import Request
from tests.conftest import RTX_4090, card, machine
from truth import pipelines

SIZE = Request(model="tiny", height=64, width=64)


def on_meta(name: str) -> Any:
    """Return a tiny pipeline whose weights are gone."""
    pipe, _ = pipelines.made(name)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to("meta")
            getattr(part, "tie_weights", lambda: None)()
    return pipe


def stop(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such operation on this device")


def read_a_value(*_: Any, **__: Any) -> Any:
    return torch.rand(1000, 1000, device="meta").sum().item()


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], Any]:
    """Give a function that lets the dry run meet a tiny pipeline whose call does something else."""

    def patch(name: str, call: Callable[..., Any]) -> Any:
        pipe = on_meta(name)
        monkeypatch.setattr(type(pipe), "__call__", functools.wraps(type(pipe).__call__)(call))
        monkeypatch.setattr(build, "pipeline", lambda model, dtype: pipe)
        return pipe

    return patch


def traced() -> Trace:
    return run.trace(facts.find(None), SIZE, "float32")


class Here(dryrunner.DryRunner):
    """Makes dry runs in this process, where it is patched."""

    def trace(self, model: Model, request: Request, dtype: str, changes: Any = (), **more: Any) -> bytes:
        return tracefile.dump(run.trace(model, request, dtype, changes))


def weights_of(pipe: Any) -> dict[str, int]:
    """Return the bytes of each component's weights, tied ones once."""
    modules = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        name: sum({id(t): t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers())}.values())
        for name, m in modules.items()
    }


@pytest.mark.parametrize(
    ("call", "because"),
    [
        (stop, "the run stopped at RuntimeError: no such operation on this device"),
        (read_a_value, "the run stopped at ValueNeeded: "),
    ],
)
def test_a_run_that_stops_is_stood_in_for_by_its_components(
    patched: Callable[[str, Callable[..., Any]], Any], call: Callable[..., Any], because: str
) -> None:
    pipe = patched("sd", call)
    found = traced()
    assert found.basis == "component"
    assert found.assumptions[0].startswith(because)
    if call is read_a_value:
        assert "_local_scalar_dense" in found.assumptions[0]
    assert len(found.assumptions) == 1  # every component could be called by itself
    assert {c.name: sum(w.size_bytes for w in c.weights()) for c in found.components} == weights_of(pipe)
    assert list(found.phases) == ["encode", "denoise", "decode"]
    begun = [e.name for e in found.told() if e.sign == ">" and "." not in e.name]
    assert begun == ["text_encoder", "unet", "unet", "vae"]
    # What denoises is called twice, and each is a step: of the steps that are asked for the rest is like the second.
    assert sum(1 for e in found.told() if e.sign == "|") == 2


def test_a_component_that_cannot_be_called_is_named_and_its_weights_still_count(
    patched: Callable[[str, Callable[..., Any]], Any],
) -> None:
    pipe = patched("sd", stop)
    pipe.unet.forward = stop
    found = traced()
    assert found.assumptions[1:] == ("unet alone: no such operation on this device",)
    assert {c.name for c in found.components} == {"vae", "text_encoder", "unet"}
    assert list(found.phases) == ["encode", "denoise", "decode"]


def test_a_pipeline_of_which_no_component_can_be_called_is_refused(
    patched: Callable[[str, Callable[..., Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = patched("sd", stop)
    for part in (pipe.unet, pipe.text_encoder):
        part.forward = stop
    monkeypatch.setattr(type(pipe.vae), "decode", stop)
    with pytest.raises(ModelError) as caught:
        traced()
    assert caught.value.exit_code == 5
    assert "cannot be dry-run" in caught.value.what
    for name in ("the run stopped at RuntimeError", "unet alone", "text_encoder alone", "vae alone"):
        assert name in caught.value.why
    assert caught.value.do


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart", "wan", "flux"])
def test_the_components_of_other_architectures_are_called_too(
    patched: Callable[[str, Callable[..., Any]], Any], name: str
) -> None:
    patched(name, stop)
    found = traced()
    assert [a for a in found.assumptions if " alone: " in a] == []
    assert found.phases[0] == "encode"
    assert {"denoise", "decode"} <= {p.partition(".")[0] for p in found.phases}


def test_an_estimate_by_components_says_so_and_is_wider(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from diffusers import FluxPipeline

    hardware = machine(card(name=RTX_4090))
    seen = engine.resolve(optimizers=["resident"], hardware=hardware).estimate
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path_factory.mktemp("components")))
    monkeypatch.setattr(FluxPipeline, "__call__", functools.wraps(FluxPipeline.__call__)(stop))
    monkeypatch.setattr(store, "_dry", Here())
    monkeypatch.setattr(store, "_SHIPPED", tmp_path_factory.mktemp("nothing"))
    plan = engine.resolve(optimizers=["resident"], hardware=hardware)
    guessed = plan.estimate
    assert (seen.basis, guessed.basis) == ("traced", "component")
    assert plan.fits is None  # what a pipeline holds between its components was not seen
    assert guessed.phases[0].weights_bytes == seen.phases[0].weights_bytes
    assert seen.peak_allocated_bytes is not None
    assert seen.interval.high_bytes is not None
    assert guessed.peak_allocated_bytes is not None
    assert guessed.interval.high_bytes is not None
    wide = guessed.interval.high_bytes / guessed.peak_allocated_bytes
    assert wide > seen.interval.high_bytes / seen.peak_allocated_bytes
    # Twice at most: the model has guidance in two passes, and its components are called once a step.
    assert seen.seconds is not None
    assert guessed.seconds is not None
    assert 0.3 * seen.seconds < guessed.seconds < seen.seconds
