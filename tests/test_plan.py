"""The plan as a value: JSON and back, the digest, and what travels."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine
from engine import validation
from engine.errors import FileError
from engine.plan import Plan
from engine.values import Estimate
from tests.conftest import card, machine

pytestmark = pytest.mark.usefixtures("no_estimates")
SCHEMA = jsonschema.Draft202012Validator(json.loads(validation.schema_text("plan")))

requests = st.fixed_dictionaries(
    {
        "height": st.integers(1, 64).map(lambda n: n * 16),
        "width": st.integers(1, 64).map(lambda n: n * 16),
        "batch": st.integers(1, 8),
        "steps": st.integers(1, 100),
        "guidance": st.none() | st.floats(-10, 10),
        "call": st.dictionaries(
            st.sampled_from(["a", "b"]), st.text(max_size=3) | st.integers() | st.none(), max_size=2
        ),
        "quality": st.sampled_from(["exact", "near", "lossy"]),
        "forbid": st.lists(st.sampled_from(["vae_tiling", "resident"]), unique=True),
    }
)
free = st.none() | st.floats(0, 100)


@given(requests, free)
def test_a_plan_obeys_its_schema_and_survives_json(request: dict[str, object], free_gib: float | None) -> None:
    plan = engine.resolve(hardware=machine(card(free_gib)), **request)  # type: ignore[arg-type]
    text = plan.to_json()
    SCHEMA.validate(json.loads(text))
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_without_a_dry_run_nothing_is_estimated_and_nothing_is_invented() -> None:
    plan = engine.resolve(hardware=machine(card()))
    assert plan.fits is None
    assert plan.estimate == Estimate()
    said = json.loads(plan.to_json())["estimate"]
    known = {k: v for k, v in said.items() if v is not None and k not in ("host", "interval")}
    assert known == {"calibrated": False, "phases": [], "assumptions": []}
    assert "not estimated" in plan.explain()


def test_the_digest_covers_what_would_be_run() -> None:
    base = engine.resolve(hardware=machine(card()))
    for other in (
        engine.resolve(hardware=machine(card()), height=64),
        engine.resolve(hardware=machine(card()), steps=9),
        engine.resolve(hardware=machine(card()), require=["vae_tiling"]),
        engine.resolve(hardware=machine(card()), call={"true_cfg_scale": 1.5}),
        engine.resolve("black-forest-labs/FLUX.1-dev", hardware=machine(card())),
    ):
        assert other.digest != base.digest


def test_the_digest_does_not_cover_what_was_seen() -> None:
    base = engine.resolve(hardware=machine(card(16, index=0)))
    other = engine.resolve(hardware=machine(card(17, index=3)), gpu=3, headroom="1GiB")
    assert other.digest == base.digest
    assert other.hardware != base.hardware


def test_a_plan_that_travels_names_no_card() -> None:
    plan = engine.resolve(hardware=machine(card()), gpu="GPU-00000000-0000-0000-0000-000000000000")
    assert "GPU-" in plan.to_json()
    travelling = plan.without_identity()
    assert "GPU-" not in travelling.to_json()
    assert travelling.digest == plan.digest


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"batch": 1', '"batch": 0', "less than 1"),
        ('"batch": 1', '"batch": 2', "digest does not match"),
        ('"fits": null', '"fits": "yes"', "is not true or false or null"),
        ('"schema": "dg-run/plan@1"', '"schema": "dg-run/plan@7"', "should be"),
        ('"rejected"', '"rejetced"', "unknown key 'rejetced'"),
        ("{", "", ""),
    ],
)
def test_a_plan_that_was_changed_is_refused(old: str, new: str, part: str) -> None:
    text = engine.resolve(hardware=machine()).to_json()
    assert old in text
    with pytest.raises(FileError) as caught:
        Plan.from_json(text.replace(old, new, 1), "lock.json")
    assert part in str(caught.value)
    assert "lock.json" in str(caught.value)


def test_a_plan_is_a_plain_frozen_value() -> None:
    plan = engine.resolve(hardware=machine(card()))
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301 - our own bytes
    assert copy.deepcopy(plan) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.fits = True  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.request.call["x"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        plan.optimizers[0].params.update(value="x")  # type: ignore[attr-defined]
