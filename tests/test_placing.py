"""Which placement holds which component: by name, by what is left, and what one pipeline cannot have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import engine
from engine import history, optimizers
from engine.errors import IncompatibleError, UsageError
from engine.estimate.estimator import Estimator
from engine.facts.model import Component, Model
from engine.optimizers import placing
from engine.plan import Plan, digest
from engine.values import FrozenDict, Request, Step
from tests.conftest import machine

PARTS = ("text_encoder", "transformer", "vae")


def step(name: str, *components: str, **params: Any) -> Step:
    return optimizers.spec(name).step({**params, **({"components": list(components)} if components else {})})


def held(*steps: Step) -> dict[str, str]:
    return {n: s.name for n, s in placing.holders(steps, PARTS).items()}


def test_what_no_placement_names_is_held_by_the_one_that_names_nothing() -> None:
    found = held(step("resident", "vae"), step("model_offload"))
    assert found == {"text_encoder": "model_offload", "transformer": "model_offload", "vae": "resident"}


def test_where_no_placement_holds_the_rest_it_is_resident() -> None:
    assert held(step("group_offload", "transformer"))["vae"] == "resident"
    assert held() == dict.fromkeys(PARTS, "resident")
    assert placing.rest([step("group_offload", "transformer")]) is None


@pytest.mark.parametrize(
    ("steps", "error", "why"),
    [
        ((step("resident"), step("model_offload")), UsageError, "both hold the rest"),
        ((step("resident", "vae"), step("model_offload", "vae")), UsageError, "'vae' is held by resident and by"),
        ((step("model_offload", "vae"), step("sequential_offload")), IncompatibleError, "cannot hold parts"),
        ((step("group_offload", "vae"), step("model_offload")), IncompatibleError, "cannot hold parts"),
        ((step("group_offload", "vae", type="block_level"),), IncompatibleError, "at block level"),
    ],
)
def test_what_one_pipeline_cannot_have_is_refused(steps: tuple[Step, ...], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        held(*steps)


def test_an_offload_that_holds_nothing_is_no_offload() -> None:
    """A model without the component that it names."""
    assert set(held(step("model_offload", "prior"), step("group_offload")).values()) == {"group_offload"}
    assert placing.spread([step("model_offload", "prior")], PARTS) == (step("resident"),)


def test_steps_are_spread_over_a_pipelines_components_resident_last() -> None:
    cast = optimizers.spec("layerwise_casting").step()
    found = placing.spread([step("resident", "vae"), cast, step("model_offload")], PARTS)
    assert found == (step("model_offload", "text_encoder", "transformer"), cast, step("resident", "vae"))
    alone = (cast, step("group_offload"))
    assert placing.spread(alone, PARTS) == alone
    implied = placing.spread([step("group_offload", "transformer")], PARTS)
    assert implied == (step("group_offload", "transformer"), step("resident", "text_encoder", "vae"))


def test_two_kinds_of_groups_hold_what_they_name() -> None:
    leaf, block = step("group_offload", "text_encoder"), step("group_offload", type="block_level")
    assert placing.holders([leaf, block], PARTS) == {"text_encoder": leaf, "transformer": block, "vae": block}


@pytest.mark.parametrize("components", [[], "vae", ["vae", "vae"], [""], [1], {"vae": 1}])
def test_components_are_a_list_of_names(components: Any) -> None:
    with pytest.raises(UsageError, match="components cannot be"):
        optimizers.spec("resident").step({"components": components})


def test_a_name_that_the_model_does_not_have_is_told_with_the_nearest() -> None:
    classes = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "scheduler": "DDIMScheduler"}
    parts = {n: Component(library="any", cls=c) for n, c in classes.items()}
    model = Model(id="toy", source="directory", pipeline_class="Toy", components=FrozenDict(parts))
    request = Request(model="toy")
    with pytest.raises(UsageError, match="no component 'text_encodr'") as caught:
        Estimator(model, request, None, None)([step("resident", "text_encodr"), step("model_offload")])
    assert "did you mean 'text_encoder'?" in str(caught.value)
    assert model.parts == ("text_encoder",)


def test_open_components_are_the_solvers_to_name() -> None:
    with pytest.raises(UsageError, match="is open"):
        held(optimizers.spec("resident").step({"components": "auto"}))


def test_components_survive_json() -> None:
    plan = engine.resolve(optimizers=[step("resident")], hardware=machine())
    listed = (step("resident", "vae", "text_encoder"), step("group_offload"))
    plan = dataclasses.replace(plan, optimizers=listed, digest=digest(plan.request, plan.profile, listed))
    assert Plan.from_json(plan.to_json()) == plan
    assert str(listed[0]) == "resident (components: [vae, text_encoder])"


def test_runs_of_components_placed_apart_are_remembered_apart() -> None:
    assert history.placement([step("resident", "vae"), step("group_offload")]) == "group_offload+resident"
    assert history.placement([step("group_offload", "transformer")]) == "group_offload+resident"
    assert history.placement([step("group_offload")]) == "group_offload"
    assert history.placement([]) == "resident"
