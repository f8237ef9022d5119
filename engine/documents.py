"""The one door for YAML and JSON that people write: safe, bounded, and able to say where every value stood.

PyYAML reads YAML 1.1, in which a bare `no` is false, `16:9` is 969 and `2020-01-01` a date, and keeps the last of two
equal keys in silence. Here only `true`, `false`, `null`, decimal integers and floats are special, keys are strings
that occur once, and aliases cannot blow a small file up into a large value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from engine.errors import DgRunError
from engine.words import shown

MAX_FILE_BYTES = 1024**2
MAX_VALUES = 20_000
MAX_DEPTH = 32
# What is told of one file: more helps nobody, and a hostile file must not become a hostile message.
MAX_PROBLEMS = 50
MAX_WORDS = 500
_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

Path_ = tuple[str | int, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader with YAML 1.2's idea of what a bare word is."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


@dataclass(frozen=True, slots=True)
class Place:
    """A spot in a document; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where; `do` is what to change."""

    place: Place | None
    what: str
    do: str = ""


@dataclass(frozen=True)
class Document:
    """A document's plain value, with the place of every value and key in it."""

    source: str
    text: str
    value: Any
    values: dict[Path_, Place]
    keys: dict[Path_, Place]

    def place(self, path: Sequence[str | int], *, key: bool = False) -> Place | None:
        """Return where the value (or the key) at `path` stands; the nearest enclosing one if it is not there."""
        full = tuple(path)
        if key and full in self.keys:
            return self.keys[full]
        while full not in self.values and full:
            full = full[:-1]
        return self.values.get(full)


class DocumentError(Exception):
    """A document that cannot be used, with every problem found in it."""

    def __init__(self, source: str, text: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, text, problems)
        self.source = source
        self.text = text
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return f"{self.source}: {self.problems[0].what if self.problems else 'it cannot be used'}"

    def told(self, kind: type[DgRunError], what: str) -> DgRunError:
        """Return an error of `kind` that shows every problem with its file, line, column and the line itself."""
        lines = self.text.splitlines()
        told = [shown_at(self.source, p, lines) for p in self.problems[:MAX_PROBLEMS]]
        if len(self.problems) > MAX_PROBLEMS:
            told.append(f"{self.source}: and {len(self.problems) - MAX_PROBLEMS} more")
        return kind(f"{self.source}: {what}", "\n       ".join(told), self._remedy())

    def _remedy(self) -> str:
        return "; ".join(dict.fromkeys(p.do for p in self.problems[:MAX_PROBLEMS] if p.do))


def shown_at(source: str, problem: Problem, lines: Sequence[str], kind: str = "") -> str:
    """Return a problem with its file, line and column, and below it the line itself with a mark."""
    what = kind + (problem.what if len(problem.what) <= MAX_WORDS else problem.what[: MAX_WORDS - 3] + "...")
    if problem.place is None:
        return f"{source}: {what}"
    line = lines[problem.place.line - 1] if problem.place.line <= len(lines) else ""
    told = f"{source}:{problem.place.line}:{problem.place.column}: {what}"
    if not line.strip():
        return told
    # A line of a thousand columns helps nobody: show the stretch around the place.
    start = max(0, problem.place.column - 60)
    stretch = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line[start : start + 100])
    return f"{told}\n         | {stretch}\n         | {' ' * (problem.place.column - 1 - start)}^"


def read_text(path: Path, most_bytes: int = MAX_FILE_BYTES) -> str:
    """Return a small UTF-8 file's text. Raises: DocumentError, when it is too large or not text; OSError."""
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise DocumentError(str(path), "", [Problem(None, f"the file is larger than {most_bytes:,} bytes")])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DocumentError(str(path), "", [Problem(Place(line, 1), "this is not UTF-8 text")]) from None


def read(path: Path) -> Document:
    """Return the document in a YAML (or JSON) file. Raises: DocumentError, OSError."""
    return parse(read_text(path), str(path))


def parse_json(text: str, source: str) -> Document:
    """Return the document in a JSON text, which YAML's rules would not always read as what it is.

    Raises: DocumentError, with the place of what is wrong.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DocumentError(
            source, text, [Problem(Place(error.lineno, error.colno), f"this is not JSON: {error.msg}")]
        ) from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(source, text, [Problem(None, f"this is not usable JSON: {error}")]) from None
    try:
        # Only for the places of values: nearly all JSON is YAML, and where it is not, problems have no place.
        shape = parse(text, source)
    except DocumentError:
        return Document(source, text, value, {}, {})
    return Document(source, text, value, shape.values, shape.keys)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} is here twice")
    return result


def parse(text: str, source: str) -> Document:
    """Return the document in `text`. Raises: DocumentError, with the place of what is wrong."""
    document, problems = inspect(text, source)
    if problems:
        raise DocumentError(source, text, problems)
    return document


def inspect(text: str, source: str, most: int = MAX_VALUES) -> tuple[Document, Sequence[Problem]]:
    """Return the document in `text` without what is wrong in it, and what that is: for whoever has more to say of it.

    Raises: DocumentError, when it cannot be read at all, or holds more than `most` values.
    """
    try:
        _refuse_too_many(text, source, most)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            builder = _Builder(source, text, loader, most)
            value = None if node is None else builder.build(node, (), 0)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise DocumentError(source, text, [_yaml_problem(error, text)]) from None
    except yaml.YAMLError as error:
        raise DocumentError(source, text, [_unreadable(error, text)]) from None
    except RecursionError:
        raise DocumentError(source, text, [Problem(None, "the document is nested too deeply")]) from None
    return Document(source, text, value, builder.values, builder.keys), builder.problems


def _refuse_too_many(text: str, source: str, most: int) -> None:
    """Refuse a large text of many or deeply nested values before a node is made of each: nodes are two hundred times
    as large as their text."""
    if len(text) <= most:
        return
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if count > most or depth > MAX_DEPTH:
            limit = f"more than {most:,} values" if count > most else f"more than {MAX_DEPTH} levels"
            raise DocumentError(source, text, [Problem(_place(event), f"the document holds {limit}")])


def _yaml_problem(error: yaml.MarkedYAMLError, text: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    what = str(error.problem or error.context or "this is not YAML")
    lines = text.splitlines()
    if error.context == "while scanning a quoted scalar" and "end of stream" in what and error.context_mark:
        begun = error.context_mark
        return Problem(Place(begun.line + 1, begun.column + 1), "the quote that begins here is not closed")
    if mark is not None and lines and mark.line >= len(lines):
        # The text ended too early: the end of its last line is a place that can be shown.
        return Problem(Place(len(lines), len(lines[-1]) + 1), f"the document ends too early: {what}")
    if mark is None:
        return Problem(None, what)
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line[mark.column : mark.column + 1] == "\t" or "\\t" in what or "tab character" in what:
        return Problem(Place(mark.line + 1, mark.column + 1), "found a tab character that indents", _SPACES)
    do = next((hint for words, hint in _HINTS.items() if words in what), "")
    return Problem(Place(mark.line + 1, mark.column + 1), what, do)


_SPACES = "indent with spaces, never with tabs"
_HINTS = {
    "mapping values are not allowed": "put a text that holds ': ' in quotes; or check the line's indentation",
    "alias": "put a text that begins with * in quotes",
    "while scanning an anchor": "put a text that begins with & in quotes",
    "alphabetic or numeric character": "put a text that begins with * or & in quotes",
    "cannot start any token": "put a text that begins with such a character in quotes",
    "did not find expected key": "check the line's indentation, and quotes within a text",
    "did not find expected ',' or ']'": "check the brackets, and quotes within a text",
    "did not find expected ',' or '}'": "check the braces, and quotes within a text",
    "expected <document start>": "begin with `key: value`; a document of more lines than one is a mapping",
}


def _unreadable(error: yaml.YAMLError, text: str) -> Problem:
    position = getattr(error, "position", None)
    if isinstance(position, int) and 0 <= position < len(text):
        before = text[:position]
        place = Place(before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)
        return Problem(place, f"the character {text[position]!r} is not allowed in YAML")
    return Problem(None, " ".join(str(error).split()))


class _Builder:
    def __init__(self, source: str, text: str, loader: Any, most: int) -> None:
        self.most = most
        self.source = source
        self.text = text
        self.loader = loader
        self.values: dict[Path_, Place] = {}
        self.keys: dict[Path_, Place] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def _error(self, node: yaml.Node, what: str, do: str = "") -> None:
        self.problems.append(Problem(_place(node), what, do))

    def build(self, node: yaml.Node, path: Path_, depth: int) -> Any:
        # Counted as expanded, so that ten lines of aliases to aliases stop here and not in memory.
        self.count += 1
        if self.count > self.most or depth > MAX_DEPTH:
            limit = f"more than {self.most:,} values" if self.count > self.most else f"more than {MAX_DEPTH} levels"
            self._error(node, f"the document holds {limit} once its aliases are followed")
            raise DocumentError(self.source, self.text, self.problems)
        self.values[path] = _place(node)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            self._error(node, f"the tag {shown(node.tag)} is not allowed", "write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                self._error(key_node, "a key must be a plain word", "put the key in quotes")
                continue
            key = str(key_node.value)
            if key == "<<" and not key_node.style:  # plain, and not in quotes
                self._error(key_node, "merge keys (<<) are not read", "write the keys out")
                continue
            if key in result:
                first = self.keys[(*path, key)].line
                self._error(key_node, f"the key {shown(key)} is here twice (first on line {first})", "keep one of them")
                continue
            self.keys[(*path, key)] = _place(key_node)
            result[key] = self.build(value_node, (*path, key), depth + 1)
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.rpartition(":")[2] if node.tag.startswith("tag:yaml.org,2002:") else None
        text = str(node.value)
        match kind:
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" if len(text) <= 20:
                return int(text)
            case "float" if len(text) <= 40:
                return float(text)
        what = (
            f"the tag {shown(node.tag)} is not allowed" if kind not in ("int", "float") else "this number is too long"
        )
        self._error(node, what, "write a plain value")
        return None


def _place(node: yaml.Node | yaml.Event) -> Place:
    mark: Any = node.start_mark
    return Place(mark.line + 1, mark.column + 1)
