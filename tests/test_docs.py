"""The documentation is true: commands parse, profiles are valid, options exist, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from engine import optimizers, profiles
from engine.cli.options import COMMANDS, Parser
from engine.errors import ProfileError
from tests.conftest import write

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks(kind: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for match in re.finditer(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield page.name, match[1]


def _parser(words: list[str]) -> tuple[Parser, list[str]]:
    name = words.pop(0) if words and words[0] in COMMANDS else "generate"
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


@pytest.mark.parametrize(("page", "text"), list(_blocks("yaml")))
def test_a_profile_in_the_documentation_is_valid(page: str, text: str, tmp_path: Path) -> None:
    try:
        profiles.load(write(tmp_path, "example.yaml", text), page)
    except ProfileError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize(("page", "text"), list(_blocks("python")))
def test_python_in_the_documentation_compiles(page: str, text: str) -> None:
    compile(text, page, "exec")


def test_every_option_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name in ("generate", *COMMANDS):
        for action in import_module(f"engine.cli.{name}").parser()._actions:
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
