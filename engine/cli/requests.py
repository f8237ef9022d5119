"""`dg-run plan --requests FILE.jsonl`: many requests, one JSON a line, one answer a line, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import engine
from engine.errors import DgRunError, FileError, UsageError
from engine.values import plain
from engine.words import did_you_mean, listing

MAX_LINE_BYTES = 1024**2
_PLAIN = (
    "model",
    "pipeline_class",
    "height",
    "width",
    "frames",
    "batch",
    "steps",
    "guidance",
    "call",
    "components",
    "profile",
    "optimizers",
)
_KINDS: tuple[tuple[str, type], ...] = (
    ("call", dict),
    ("components", dict),
    ("optimizers", list),
    ("model", str),
    ("pipeline_class", str),
    ("profile", str),
)
_HARDWARE = ("gpu", "vram", "host_ram")
_KEYS = ("id", "hardware", *_PLAIN)


def answer_all(path: Path) -> int:
    """Print the answer to each request of a file. Returns 0 when every line was answered. Raises: FileError."""
    for number, line in lines(path):
        print(json.dumps(_answer(line, number)), flush=True)
    return 0


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that say something, each with its number. Raises: FileError."""
    yield from ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())


def parsed(line: str, number: int) -> Mapping[str, Any]:
    """Return the request in a line, unchecked. Raises: UsageError."""
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"line {number} is not JSON", str(error), "write one object a line") from None
    if not isinstance(request, Mapping):
        raise UsageError(f"line {number} is not an object", do='write {"id": …, "model": …}')
    return request


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise FileError(f"{path} has a line of more than 1 MiB", "a request is some hundred bytes")
                yield line.decode("utf-8", errors="replace")
    except OSError as error:
        raise FileError(f"{path} cannot be read", error.strerror or str(error), "check the path") from error


def _answer(line: str, number: int) -> dict[str, Any]:
    """Return a plan, or what was wrong, with the request's id (its line's number, where it has none)."""
    name: Any = number
    try:
        request = parsed(line, number)
        name = request.get("id", number)
        return {"id": name, **plain(engine.resolve(**arguments(request)))}
    except DgRunError as error:
        return {"id": name, "error": _told(error)}
    except RecursionError:
        return {"id": number, "error": _told(UsageError(f"line {number} is nested too deeply"))}
    except Exception as error:  # noqa: BLE001 - a mistake of ours in one answer keeps nobody from the others
        internal = DgRunError(f"an internal error: {type(error).__name__}: {error}", "this is a mistake in dg-run")
        return {"id": name, "error": _told(internal)}


def _told(error: DgRunError) -> dict[str, Any]:
    return {"code": error.exit_code, "what": error.what, "why": error.why, "do": error.do}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def arguments(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `engine.resolve` for a request. Raises: UsageError."""
    _refuse_unknown(request, _KEYS)
    hardware = {} if request.get("hardware") is None else request["hardware"]
    if not isinstance(hardware, Mapping):
        raise UsageError("hardware is not an object", do='write {"gpu": "RTX 4090", "vram": "20GiB"}')
    _refuse_unknown(hardware, _HARDWARE)
    given = {k: v for k in _PLAIN if (v := request.get(k)) is not None}
    for key, kind in _KINDS:
        if key in given and not isinstance(given[key], kind):
            raise UsageError(f"{key} is not {'an object' if kind is dict else 'a list' if kind is list else 'text'}")
    return {**given, **{k: v for k, v in hardware.items() if v is not None}}


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [k for k in given if k not in known]
    if unknown:
        raise UsageError(f"a request has no {listing(unknown)}", do=did_you_mean(unknown[0], known))
