"""Hold a document against one of the project's JSON Schemas, and say every problem where it stands.

jsonschema costs 80 ms to import. A document that has passed once is remembered by its content in the cache folder, so
that planning with profiles that did not change does not pay for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import files, paths
from engine.documents import Document, DocumentError, Problem, parse, read_text
from engine.words import did_you_mean, listing, shown

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


_MOST = 200
# No text that has a form is longer.
_LONGEST = 4_096


@cache
def schema_text(name: str) -> str:
    """Return the text of `schema/NAME.schema.json`."""
    return (paths.data_dir("schema") / f"{name}.schema.json").read_text(encoding="utf-8")


def check(document: Document, schema: str) -> None:
    """Return when `document` obeys the schema. Raises: DocumentError, with all its problems."""
    if found := problems(document, schema):
        raise DocumentError(document.source, document.text, found)


def check_once(document: Document, schema: str) -> None:
    """The same as `check`, remembering a document that passed: for files that are read again and again."""
    if found := problems_once(document, schema):
        raise DocumentError(document.source, document.text, found)


def value_once(path: Path, schema: str) -> Any:
    """Return the value of a YAML file that obeys the schema: as it was read before, where its content is the same.

    For large files of the project's own, of which nobody asks where a value stood. Raises: DocumentError, OSError.
    """
    text = read_text(path)
    kept = paths.cache_dir() / "values" / f"{_digest(schema, text)}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(kept.read_text(encoding="utf-8"))
    document = parse(text, str(path))
    check(document, schema)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        files.write(kept, json.dumps(document.value, ensure_ascii=False, separators=(",", ":")).encode())
    return document.value


def _digest(schema: str, text: str) -> str:
    return hashlib.sha256(f"{schema_text(schema)}\0{text}".encode()).hexdigest()


def problems(document: Document, schema: str) -> list[Problem]:
    """Return what speaks against `document`, in the order of its places; of very much the beginning."""
    validator = _validator(schema)
    found = itertools.chain.from_iterable(_told(document, e) for e in validator.iter_errors(document.value))
    return in_order(itertools.islice(found, _MOST))


@cache
def _validator(schema: str) -> Any:
    import jsonschema

    def pattern(validator: Any, wanted: str, value: Any, schema: dict[str, Any]) -> Iterator[ValidationError]:
        # A long text is refused unlooked at: a pattern that repeats groups takes 300 bytes for each of its characters.
        # In Python `$` is also before a last line's end; in JSON Schema it is the end.
        whole = wanted[:-1] + r"\Z" if wanted.endswith("$") else wanted
        if isinstance(value, str) and (len(value) > _LONGEST or re.search(whole, value) is None):
            yield jsonschema.ValidationError(f"{_short(value)} does not match")

    extend: Callable[..., Any] = jsonschema.validators.extend
    return extend(jsonschema.Draft202012Validator, {"pattern": pattern})(json.loads(schema_text(schema)))


def problems_once(document: Document, schema: str) -> list[Problem]:
    """The same as `problems`, remembering a document that has none."""
    stamp = paths.cache_dir() / "valid" / _digest(schema, document.text)
    if stamp.exists():
        return []
    found = problems(document, schema)
    if not found:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return found


def in_order(found: Iterable[Problem]) -> list[Problem]:
    """Return problems by their places, each once."""
    return sorted(dict.fromkeys(found), key=lambda p: (p.place.line, p.place.column) if p.place else (0, 0))


def _told(document: Document, error: ValidationError, words: Sequence[str] = ()) -> Iterator[Problem]:
    path = list(error.absolute_path)
    here = document.place(path)
    keyword = str(error.validator)
    value: Any = error.instance
    wanted: Any = error.validator_value
    schema: Any = error.schema
    if keyword == "additionalProperties":
        known = list(schema.get("properties", {}))
        for key in sorted(set(value) - set(known)):
            place = document.place([*path, key], key=True)
            yield Problem(place, f"unknown key {shown(key)}", did_you_mean(key, known))
        return
    if keyword == "required":
        missing = [k for k in wanted if k not in value]
        yield Problem(
            here,
            f"the key {missing[0]!r} is missing" if len(missing) == 1 else f"the keys {listing(missing)} are missing",
        )
        return
    if keyword == "dependentRequired":
        for key, needed in wanted.items():
            if key in value and (missing := [n for n in needed if n not in value]):
                yield Problem(document.place([*path, key], key=True), f"{key!r} needs {listing(map(repr, missing))}")
        return
    if keyword == "not" and (because := schema.get("$comment")):
        # What may not be there together is shown where the last of it stands.
        key = wanted.get("required", [None])[-1]
        place = here if key is None else document.place([*path, key], key=True)
        yield Problem(place, str(because), _remedy(value, wanted, schema))
        return
    if keyword == "anyOf" and error.context:
        # The first of them is the usual form; the others are words that may stand for it.
        more = [w["const"] for w in wanted[1:] if "const" in w]
        for usual in error.context:
            if usual.schema_path[0] == 0:
                yield from _told(document, usual, more)
        return
    if keyword == "enum" and isinstance(value, str):
        yield Problem(
            here,
            f"{value!r} is not known here",
            did_you_mean(value, [*(w for w in wanted if isinstance(w, str)), *words]),
        )
        return
    say = _SAY.get(keyword)
    yield Problem(here, say(value, wanted, schema) if say else error.message[:200], _remedy(value, wanted, schema))


def _remedy(value: Any, wanted: Any, schema: dict[str, Any]) -> str:
    """Return what to write instead: what the schema says itself, or what YAML's habits suggest."""
    if (said := schema.get("errorMessage")) is not None:
        return str(said)
    if wanted == "boolean" and isinstance(value, str) and value.casefold() in ("yes", "no", "on", "off", "y", "n"):
        return "yes, no, on and off are words here: write true or false"
    if wanted == "string" and isinstance(value, int | float | None):
        return "put it in quotes"
    return ""


_Say = Callable[[Any, Any, dict[str, Any]], str]


def _short(value: Any) -> str:
    if isinstance(value, str):
        value = value[:60]  # before it is written, not after: it may be long
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _types(wanted: Any) -> str:
    names = {
        "object": "a mapping",
        "array": "a list",
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
    }
    names |= {"boolean": "true or false", "null": "null"}
    return listing([names[w] for w in ([wanted] if isinstance(wanted, str) else wanted)], "or")


_SAY: dict[str, _Say] = {
    "type": lambda v, w, _: f"{_short(v)} is not {_types(w)}",
    "const": lambda v, w, _: f"{_short(v)} should be {_short(w)}",
    "enum": lambda v, w, _: f"{_short(v)} should be one of {listing(map(_short, w), 'or')}",
    "pattern": lambda v, _, s: f"{_short(v)} is not {s.get('description', 'in the right form')}",
    "minimum": lambda v, w, _: f"{_short(v)} is less than {w}",
    "maximum": lambda v, w, _: f"{_short(v)} is more than {w}",
    "minItems": lambda v, w, _: f"the list holds {len(v)}, and needs at least {w}",
    "maxItems": lambda v, w, _: f"the list holds {len(v)}, and may hold {w}",
    "uniqueItems": lambda *_: "the list holds something twice",
    "minLength": lambda *_: "the text is empty",
    "maxLength": lambda v, w, _: f"the text is longer than {w} characters",
    "minProperties": lambda *_: "the mapping is empty",
    "maxProperties": lambda v, *_: f"one name is wanted here, and there are {len(v)}: {listing(v)}",
}
