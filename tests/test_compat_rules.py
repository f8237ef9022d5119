"""The file of rules: its form, its names, its evidence, and the statements that it was made from."""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import compat, documents, optimizers, paths, versions
from tests.evidence import statements
from tools import make_docs

ROOT = Path(__file__).parents[1]
WHOLE = compat.shipped()
ENTRIES: tuple[compat.Rule | compat.Fact, ...] = (*WHOLE.rules, *WHOLE.facts)


def _schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (paths.data_dir("schema") / "compatibility.schema.json").read_text(encoding="utf-8")
    )
    return found


def test_the_rules_obey_their_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(_schema())
    value = documents.read(paths.data_dir("schema") / "compatibility.yaml").value
    jsonschema.Draft202012Validator(_schema()).validate(value)


RULE = {
    "id": "a-rule",
    "kind": "excludes",
    "subjects": ["resident", {"optimizer": "group_offload", "params": {"use_stream": True}}],
    "because": "x",
    "remedy": "y",
    "evidence": ["tests/evidence/test_x.py::test_y"],
}


@pytest.mark.parametrize(
    ("changed", "is_valid"),
    [
        ({}, True),
        ({"evidence": None}, False),
        ({"evidence": []}, False),
        ({"evidence": ["tests/test_x.py"]}, False),
        ({"because": ""}, False),
        ({"kind": "forbids"}, False),
        ({"subjects": ["resident"]}, False),
        ({"subjects": [{"optimizer": "group_offload"}]}, False),
        ({"subjects": ["resident", {"optimizer": "dtype", "params": {"value": {"unlike": "storage"}}}]}, False),
        ({"when": {"device": "tpu"}}, False),
        ({"when": {"libraries": {"diffusers": ">=0.42,<0.43"}}}, True),
        ({"when": {"libraries": {"diffusers": "0.42"}}}, False),
        ({"when": {"libraries": {"xfuser": ">=0.7"}}}, False),
        ({"when": {"compute_capability": {"below": 8}}}, False),
        ({"when": {"gpus": {"at_least": 2}, "platform": ["linux"]}}, True),
        ({"when": {"component": {"cls": ["AutoencoderKL"]}}}, False),
        ({"needs": ["vae_tiling"]}, False),
        ({"kind": "requires", "subjects": None, "needs": ["vae_tiling"]}, True),
        ({"kind": "requires", "subjects": None}, False),
        ({"kind": "degrades", "subjects": ["cache"], "beside": ["resident"]}, True),
        ({"kind": "degrades", "overlap": True}, False),
        ({"overlap": True}, True),
        ({"kind": "no_effect", "subjects": ["cache"], "parameter": "method"}, True),
        ({"parameter": "method"}, False),
        ({"basis": "heard"}, False),
    ],
    ids=lambda v: json.dumps(v) if isinstance(v, dict) else "",
)
def test_the_form_of_a_rule(changed: dict[str, Any], is_valid: bool) -> None:
    rule = {k: v for k, v in (RULE | changed).items() if v is not None}
    whole = {
        "schema": "dg-run/compatibility@1",
        "planned": {},
        "matrix": {"rows": ["resident"], "columns": ["xdit"], "works": []},
        "rules": [rule],
        "facts": [],
    }
    assert jsonschema.Draft202012Validator(_schema()).is_valid(whole) is is_valid


def test_every_id_is_there_once() -> None:
    assert [i for i, n in Counter(e.id for e in ENTRIES).items() if n > 1] == []


def test_the_conditions_that_are_known_are_those_of_the_schema() -> None:
    when = _schema()["$defs"]["when"]["properties"]
    assert set(when) == set(compat.CONDITIONS)
    assert set(when["component"]["properties"]["of"]["enum"]) == set(compat.ROLES)
    assert set(when["libraries"]["properties"]) == set(versions.TESTED)


@pytest.mark.parametrize("rule", WHOLE.rules, ids=lambda r: r.id)
def test_a_rule_speaks_of_what_there_is(rule: compat.Rule) -> None:
    """Optimizers that are there or planned, their parameters and choices, traits, and classes of the libraries."""
    known = {*optimizers.NAMES, *WHOLE.planned}
    for subject in (*rule.subjects, *rule.beside, *rule.needs):
        assert subject.optimizer in known, subject
        params = compat.known_params(subject.optimizer)
        for name, wanted in subject.params:
            assert name in params, subject
            choices, values = params[name], _values(wanted)
            assert choices is None or set(values) <= set(choices), subject
    if rule.parameter is not None:
        assert all(rule.parameter in compat.known_params(s.optimizer) for s in rule.subjects)
    assert set(rule.when.get("traits", {})) <= set(compat.TRAITS)


def _values(wanted: Any) -> tuple[Any, ...]:
    if isinstance(wanted, dict):
        return tuple(wanted.get("other_than", ()))
    return wanted if isinstance(wanted, tuple) else (wanted,)


def test_what_is_bound_to_versions_is_bound_to_those_that_are_tested() -> None:
    """Its evidence runs on the installed libraries: a rule that is silent on them would be shown by nothing."""
    for rule in WHOLE.rules:
        for name, ranges in rule.when.get("libraries", {}).items():
            tested = versions.TESTED[name]
            assert versions.within(tested.low, ranges), rule.id
            assert not versions.within(tested.below, ranges), f"{rule.id} speaks of versions that nobody tried"


def test_every_trait_is_asked_for() -> None:
    assert {t for rule in WHOLE.rules for t in rule.when.get("traits", {})} == set(compat.TRAITS)


def test_what_is_planned_is_not_there_yet() -> None:
    """A name with a module has no place in `planned`, but for parameters that the module does not have."""
    for name, params in WHOLE.planned.items():
        own = {p.name for p in optimizers.spec(name).params} if name in optimizers.NAMES else set()
        assert (name not in optimizers.NAMES) or params, f"{name} has a module now: take it out of planned"
        assert not own & set(params), f"{name} has these now: take them out of planned"


def test_the_classes_that_rules_name_are_classes_of_the_libraries() -> None:
    import diffusers
    import transformers

    for rule in WHOLE.rules:
        component = rule.when.get("component", {})
        for name in (*rule.when.get("pipeline", ()), *component.get("cls", ()), *component.get("other_than", ())):
            assert hasattr(diffusers, name) or hasattr(transformers, name), (rule.id, name)


@cache
def _marked(file: str) -> dict[str, set[str]]:
    """Return the rules that each test of a file is marked with."""
    found: dict[str, set[str]] = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = {
                str(argument.value)
                for call in node.decorator_list
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.rule"
                for argument in call.args
                if isinstance(argument, ast.Constant)
            }
    return found


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.id)
def test_every_rule_and_fact_has_its_evidence(entry: compat.Rule | compat.Fact) -> None:
    """A test that is there, and that says which rule it shows."""
    for evidence in entry.evidence:
        file, _, name = evidence.partition("::")
        assert name in _marked(file), evidence
        assert entry.id in _marked(file)[name], f"{evidence} is not marked as evidence of {entry.id}"


def test_every_test_that_says_it_shows_a_rule_is_its_evidence() -> None:
    named = defaultdict(set)
    for entry in ENTRIES:
        for evidence in entry.evidence:
            named[evidence].add(entry.id)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, ids in _marked(file).items():
            assert ids <= named[f"{file}::{name}"], f"{file}::{name}"


@pytest.mark.parametrize("works", WHOLE.works, ids=lambda w: w.columns[0])
def test_the_cells_that_work_have_their_evidence(works: Any) -> None:
    for evidence in works.evidence:
        file, _, name = evidence.partition("::")
        assert name in _marked(file)


def test_packages_are_named_where_a_test_takes_them() -> None:
    """So that a person knows which evidence was skipped here."""
    for entry in ENTRIES:
        takes = any(e.partition("::")[0].endswith(("test_lora.py", "test_quantized.py")) for e in entry.evidence)
        assert not takes or entry.packages, entry.id


def test_every_statement_came_to_something() -> None:
    """What was collected of the libraries, row by row: a rule, a fact, or that it does not hold any more."""
    ids = {e.id for e in ENTRIES}
    for statement in statements.ALL:
        assert statement.held_by or statement.no_longer, statement.about
        assert set(statement.held_by) <= ids, statement.about
    assert len(statements.ALL) == statements.COLLECTED
    assert len({s.about for s in statements.ALL}) == len(statements.ALL)


def test_the_page_is_made_of_the_rules() -> None:
    assert make_docs.PATH.read_text(encoding="utf-8") == make_docs.page(), "stale: make schemas"


def test_every_cell_of_the_matrix_is_on_the_page() -> None:
    rows = [line.split(" | ") for line in make_docs.matrix().splitlines()[2:]]
    assert [len(row) - 1 for row in rows] == [4] * 6
    told = Counter(cell.strip("| ")[:2] for row in rows for cell in row[1:])
    assert told == {"✓": 9, "[✗": 9, "–": 3, "(✓": 3}
