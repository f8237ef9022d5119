"""What to change to get more: each piece of advice, followed, gives what it says."""

from __future__ import annotations

import dataclasses

import pytest

import engine
from engine.plan import Plan
from engine.units import parse_size
from engine.values import Hardware
from tests.conftest import GIB, RTX_4090, card, machine

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def small(free_gib: float, host_gib: int = 32) -> Hardware:
    seen = machine(card(free_gib, name=RTX_4090))
    return dataclasses.replace(seen, host=dataclasses.replace(seen.host, ram_bytes=host_gib * GIB))


def advised(seen: Hardware, **asked: object) -> Plan:
    return engine.advise(engine.resolve(SDXL, hardware=seen, **asked))  # type: ignore[arg-type]


def test_with_so_much_more_vram_it_is_what_was_said_and_with_less_it_is_not() -> None:
    seen = small(6.0)
    plan = advised(seen)
    assert plan.advice
    nearest = next(a for a in plan.advice if a.kind == "vram")
    assert nearest.more_bytes is not None
    free = seen.gpus[0].free_bytes
    assert free is not None
    there = engine.resolve(SDXL, hardware=small((free + nearest.more_bytes) / GIB))
    assert there.optimizers == nearest.optimizers
    assert there.estimate.seconds == nearest.seconds
    assert (there.estimate.seconds or 0) < (plan.estimate.seconds or 0)
    short = engine.resolve(SDXL, hardware=small((free + nearest.more_bytes - 2**20) / GIB))
    assert short.optimizers != nearest.optimizers
    assert nearest.change in plan.explain()


def test_what_fits_nowhere_is_told_the_least_that_would() -> None:
    plan = advised(small(3.0))
    assert plan.fits is False
    assert plan.advice
    more = plan.advice[0]
    assert more.more_bytes is not None
    there = engine.resolve(SDXL, hardware=small(3.0 + more.more_bytes / GIB))
    assert there.fits is True
    assert "it would fit" in plan.explain()


def test_what_a_wish_costs_is_said() -> None:
    plan = advised(small(7.7), forbid=["resident", "group_offload", "layerwise_casting"])
    assert plan.advice is not None
    kinds = {a.kind: a for a in plan.advice}
    assert kinds["forbid"].change.startswith("without --forbid ")
    assert (kinds["forbid"].seconds or 0) < (plan.estimate.seconds or 0)


@pytest.mark.slow
def test_a_large_batch_is_told_the_batch_that_stays_on_the_card() -> None:
    plan = advised(small(9.8), batch=16)
    smaller = next((a for a in plan.advice or () if a.kind == "batch"), None)
    assert smaller is not None
    size = int(smaller.change.removeprefix("--batch_size "))
    assert engine.resolve(SDXL, hardware=small(9.8), batch=size).optimizers == smaller.optimizers


def test_an_exact_list_and_a_machine_without_a_card_are_not_advised() -> None:
    assert engine.advise(engine.resolve(device="cpu")).advice is None
    exact = engine.resolve(SDXL, optimizers=["resident"], hardware=small(6.0))
    assert engine.advise(exact).advice is None


def test_advice_survives_json_and_its_schema() -> None:
    plan = advised(small(6.0))
    assert engine.Plan.from_json(plan.to_json()) == plan
    assert parse_size("1GiB") == GIB


@pytest.mark.parametrize("free_gib", [23.0])
def test_where_nothing_could_be_better_nothing_is_said(free_gib: float) -> None:
    assert advised(small(free_gib, host_gib=64)).advice == ()
