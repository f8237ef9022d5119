"""Traces as values: other ways through the VAE, and components that are not there."""

from __future__ import annotations

from typing import Any

import torch

from engine.dryrun import record
from engine.estimate.trace import Builder, Trace, TracedComponent, TracedModule, Weight


def component(name: str) -> TracedComponent:
    weight = Weight(name="w", storage=len(name), size_bytes=8, is_buffer=False)
    return TracedComponent(name=name, modules=(TracedModule(path=f"{name}.a", weights=(weight,)),))


def made(builder: Builder) -> Trace:
    return Trace(
        pipeline_class="Toy",
        components=(component("text"), component("net")),
        offload_chain=("text", "net"),
        offload_excluded=(),
        **builder.tables(),
    )


def test_what_a_component_that_is_left_out_would_give_is_handed_in() -> None:
    builder = Builder()
    ids = builder.born(1)
    builder.phase("encode")
    builder.begin("text")
    builder.begin("text.a")
    inner = builder.born(100)
    given = builder.born(10)
    builder.died(ids)
    builder.died(inner)
    builder.end("text.a")
    builder.end("text")
    builder.phase("denoise")
    builder.begin("net")
    latents = builder.born(40)
    builder.died(given)
    builder.end("net")
    builder.died(latents)

    left = made(builder).without(["text"])
    assert [c.name for c in left.components] == ["net"]
    assert left.offload_chain == ("net",)
    told = [(e.sign, e.name or e.size_bytes) for e in left.told()]
    assert told == [
        ("+", 1),
        ("=", "encode"),
        ("-", 1),
        ("+", 10),
        ("=", "denoise"),
        (">", "net"),
        ("+", 40),
        ("-", 10),
        ("<", "net"),
        ("-", 40),
    ]


def test_leaving_out_what_is_not_there_changes_nothing() -> None:
    whole = made(Builder())
    assert whole.without(["vae"]) is whole
    assert whole.without([]) is whole


def test_weights_are_moved_as_modules_move_them_children_first_and_tied_ones_once() -> None:
    """The order of `Module.to`, read off a module that notes it."""

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = torch.nn.Parameter(torch.zeros(1))
            self.first = torch.nn.Linear(2, 2)
            self.second = torch.nn.Linear(2, 2)
            self.second.weight = self.first.weight

    module = torch.nn.Sequential(Inner(), torch.nn.Sequential(Inner()), torch.nn.Linear(2, 2))
    module.register_buffer("table", torch.zeros(3))
    order: list[int] = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        order.append(tensor.data_ptr())
        return tensor

    applied: Any = module
    applied._apply(noted)
    (component,) = record.components({"vae": module})
    at = {t.untyped_storage()._cdata: t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    assert [at[w.storage] for w in component.moved()] == list(dict.fromkeys(order))
    assert {w.storage for w in component.moved()} == {w.storage for w in component.weights()}
