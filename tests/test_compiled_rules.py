"""The JSON Schema of profiles refuses what the rules refuse, to whoever asks nothing but the schema."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import compat, documents, optimizers, paths, profiles
from engine.compat import Rule, Subject
from engine.errors import ProfileError
from tests.conftest import write
from tools import compile_rules

CASES = documents.read(Path(__file__).with_name("schema_cases.yaml")).value["cases"]
HEAD = {"schema": "dg-run/profile@1", "name": "ours", "version": "1.0.0", "summary": "ours"}


@cache
def _profiles() -> jsonschema.Draft202012Validator:
    return _validator(json.loads((paths.data_dir("schema") / "profile.schema.json").read_text(encoding="utf-8")))


def _validator(schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def _of_steps(rules: list[Rule] | None = None) -> jsonschema.Draft202012Validator:
    return _validator({"$defs": compile_rules.definitions(rules), "$ref": f"#/$defs/{compile_rules.NAME}"})


def _name(case: dict[str, Any]) -> str:
    return json.dumps(case["optimizers"]).replace('"', "")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_what_the_schema_says_of_a_list(case: dict[str, Any]) -> None:
    errors = list(_profiles().iter_errors(HEAD | {"optimizers": case["optimizers"]}))
    if "refused" not in case:
        assert errors == []
        return
    (error,) = errors
    assert error.validator == "not"
    assert case["refused"]["rule"] in error.schema["$comment"]
    assert error.schema["errorMessage"]
    assert list(error.absolute_path) == ["optimizers", *case["refused"]["at"]]


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_what_the_schema_refuses_dg_run_refuses(case: dict[str, Any], tmp_path: Path) -> None:
    """In words that name the rule, and with a remedy; order, which the schema does not know, is refused beside it."""
    path = write(tmp_path, "ours.yaml", json.dumps(HEAD | {"optimizers": case["optimizers"]}))
    if "refused" in case:
        with pytest.raises(ProfileError, match=case["refused"]["rule"]) as caught:
            profiles.load(path, "ours.yaml")
        assert caught.value.do


def test_there_are_cases_of_every_rule_that_is_compiled() -> None:
    compiled = {r.id for r in compat.rules() if compile_rules._is_compiled(r)}
    text = json.dumps(compile_rules.definitions())
    assert all(f"(rule {i})" in text for i in compiled)
    tried = {c["refused"]["rule"] for c in CASES if "refused" in c}
    assert compiled - tried <= {
        "xdit-or-model-offload",  # xdit is refused by itself in this version
        "xdit-or-sequential-offload",
        "xdit-or-group-offload",
        "resident-or-sequential-offload",
    }


def test_the_schema_and_the_rules_agree_on_every_pair() -> None:
    """Of two optimizers by their names alone, in either order, but for order."""
    validator = _of_steps()
    speaking = compat.under(compat.Facts())
    for pair in itertools.product(optimizers.NAMES, repeat=2):
        steps = tuple(optimizers.spec(n).step() for n in pair)
        broken = [f for f in speaking.findings(steps) if f.breaks and f.rule.kind != "before"]
        assert validator.is_valid(list(pair)) is not bool(broken), pair


def _rule(kind: str, *subjects: Subject, needs: tuple[Subject, ...] = (), overlap: bool = False) -> Rule:
    return Rule(
        id="a-rule",
        kind=kind,
        subjects=subjects,
        needs=needs,
        overlap=overlap,
        because="of this",
        remedy="do that",
        evidence=(),
    )


def _is_valid(rule: Rule, steps: list[Any]) -> bool:
    return bool(_of_steps([rule]).is_valid(steps))


def _of(optimizer: str, **params: Any) -> Subject:
    return Subject(optimizer=optimizer, params=tuple(params.items()))


@pytest.mark.parametrize(
    ("steps", "is_valid"),
    [
        (["vae_tiling", "group_offload"], False),  # true is the default
        (["vae_tiling", {"group_offload": {"type": "block_level"}}], False),
        (["vae_tiling", {"group_offload": {"use_stream": True}}], False),
        (["vae_tiling", {"group_offload": {"use_stream": False}}], True),
        (["vae_tiling", {"group_offload": {"use_stream": "auto"}}], True),  # the solver has a choice
    ],
)
def test_a_condition_on_a_parameter_knows_its_default(steps: list[Any], is_valid: bool) -> None:
    assert _is_valid(_rule("excludes", _of("vae_tiling"), _of("group_offload", use_stream=True)), steps) is is_valid


@pytest.mark.parametrize(
    ("steps", "is_valid"),
    [
        (["group_offload"], True),
        ([{"group_offload": {"blocks_per_group": 1}}], True),
        ([{"group_offload": {"blocks_per_group": 2}}], False),
        ([{"group_offload": {"blocks_per_group": "auto"}}], True),
    ],
)
def test_a_condition_of_all_but_some(steps: list[Any], is_valid: bool) -> None:
    rule = _rule("requires", _of("group_offload", blocks_per_group={"other_than": (1,)}))
    assert _is_valid(rule, steps) is is_valid


@pytest.mark.parametrize(
    ("steps", "is_valid"),
    [
        (["vae_slicing"], False),
        (["vae_slicing", "vae_tiling"], True),
        (["vae_slicing", {"one_of": ["none", "vae_tiling"]}], True),
        (["vae_slicing", {"one_of": ["none", ["vae_tiling", "fuse_qkv"]]}], True),
        (["vae_slicing", {"one_of": ["none", "fuse_qkv"]}], False),
        (["fuse_qkv"], True),
    ],
)
def test_what_needs_another(steps: list[Any], is_valid: bool) -> None:
    assert _is_valid(_rule("requires", _of("vae_slicing"), needs=(_of("vae_tiling"),)), steps) is is_valid


@pytest.mark.parametrize(
    ("steps", "is_valid"),
    [
        (["resident", "group_offload"], False),
        ([{"resident": {"components": ["vae"]}}, "group_offload"], True),
        (["resident", {"group_offload": {"components": ["vae"]}}], True),
    ],
)
def test_placements_of_some_components_are_left_to_the_rules(steps: list[Any], is_valid: bool) -> None:
    assert _is_valid(_rule("excludes", _of("resident"), _of("group_offload"), overlap=True), steps) is is_valid


@pytest.mark.parametrize(("value", "is_valid"), [("float16", False), ("auto", True)])
def test_a_step_that_is_one_value(value: str, is_valid: bool) -> None:
    rule = _rule("excludes", _of("dtype", value="float16"), _of("fuse_qkv"))
    assert _is_valid(rule, [{"dtype": value}, "fuse_qkv"]) is is_valid


def test_rules_that_ask_for_more_are_not_compiled() -> None:
    for rule in compat.rules():
        if rule.when or rule.kind not in ("excludes", "requires"):
            assert not compile_rules._is_compiled(rule)
