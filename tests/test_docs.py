"""The documentation is true: commands parse, profiles are valid, options exist, links lead somewhere."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import engine
from engine import lock, optimizers, profiles, scenarios
from engine.cli import profiles as profiles_command
from engine.cli.options import COMMANDS, Parser
from engine.errors import DgRunError
from tests.conftest import write

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(kind: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for match in re.finditer(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield page.name, match[1]


def _parser(words: list[str]) -> tuple[Parser, list[str]]:
    name = words.pop(0) if words and words[0] in COMMANDS else "generate"
    if name == "profiles":
        return profiles_command.parser(words.pop(0)), words
    made: Parser = import_module(f"engine.cli.{name}").parser()
    return made, words


COMMAND_LINES = [
    (page, line.removeprefix("$ dg-run"))
    for page, block in _blocks("console")
    for line in block.splitlines()
    if line.startswith("$ dg-run")
]


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES)
def test_a_command_in_the_documentation_parses(page: str, line: str) -> None:
    made, words = _parser(shlex.split(line, comments=True))
    assert made.read(words)


def test_there_are_commands_in_the_documentation() -> None:
    assert len(COMMAND_LINES) >= 5


@pytest.mark.parametrize(("page", "text"), [(p, t) for p, t in _blocks("yaml") if "schema: dg-run/lock@" not in t])
def test_a_profile_or_scenario_in_the_documentation_is_valid(page: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path, "example.yaml", text)
    try:
        if "dg-run/profile@" in text:
            profiles.load(path, page)
        elif text.startswith("why:"):
            assert scenarios.run(scenarios.load(path)).differences == ()
        else:
            yaml.safe_load(text)  # for another program: pre-commit, or a CI
    except DgRunError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize(("page", "text"), [(p, t) for p, t in _blocks("yaml") if "schema: dg-run/lock@" in t])
def test_a_lock_in_the_documentation_is_whole(page: str, text: str) -> None:
    assert lock.parse(text, page).text() == text


@pytest.mark.parametrize(("page", "text"), list(_blocks("python")))
def test_python_in_the_documentation_compiles(page: str, text: str) -> None:
    compile(text, page, "exec")


def test_every_option_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    parsers = [import_module(f"engine.cli.{name}").parser() for name in ("generate", *COMMANDS)]
    parsers += [profiles_command.parser(action) for action in profiles_command.ACTIONS]
    for made in parsers:
        for action in made._actions:
            for option in action.option_strings:
                if option.startswith("--") and option not in ("--help", "--version"):
                    assert f"`{option}" in text or f" {option}" in text, option


def test_every_optimizer_and_profile_has_its_row() -> None:
    rows = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in rows for name in optimizers.NAMES)
    rows = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    assert all(f"| `{p.name}` |" in rows for p in profiles.built_in())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_what_is_assumed_of_cards_is_said_to_be() -> None:
    """Figures without a measurement behind them are in `gpus/*.json`, each saying so, and on the page."""
    text = (ROOT / "docs" / "calibration.md").read_text(encoding="utf-8")
    found = set()
    for name in ("speeds.json", "libraries.json"):
        content = json.loads((ROOT / "engine" / "gpus" / name).read_text(encoding="utf-8"))
        found |= {key for key, entry in content.items() if '"evidence": "assumed' in json.dumps(entry)}
    assert found == {"convolution_share", "group_s"}
    assert all(f"| `{name}`" in text for name in found)


def test_every_argument_of_resolve_has_its_row_with_its_type() -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    told = {name for names in rows for name in names}
    assert set(inspect.signature(engine.resolve).parameters) <= told
