"""Plain values written as YAML for people, which `documents` reads back as the same values.

PyYAML's own writer follows YAML 1.1: it leaves `1e5` without quotes, which is text there and a number to `documents`.
Here text goes without quotes only where nothing could take it for anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from engine.units import format_size

WIDTH = 110
# Begins with a letter, and holds nothing that means something in YAML, within brackets or outside.
_BARE = re.compile(r"[A-Za-z][A-Za-z0-9_./@+-]*( [A-Za-z0-9_./@+(-][A-Za-z0-9_./@+()-]*)*\Z")
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
# What YAML takes as it is in a quoted text; U+0085, U+2028 and U+2029 would be read as ends of lines.
_RAW = re.compile(r"[\x20-\x7e\u00a0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")


def yaml(value: Mapping[str, Any]) -> str:
    """Return a mapping as YAML, its keys in their order. Sizes are told for reading in comments.

    Raises: ValueError, for a number that is not finite, or a value that is not plain.
    """
    return "\n".join(_mapping(value, "", 0)) + "\n"


def _mapping(value: Mapping[str, Any], indent: str, depth: int) -> list[str]:
    lines = []
    for key, item in value.items():
        head = f"{indent}{_text(str(key))}:"
        flow = _flow(item)
        nested = isinstance(item, Mapping | list | tuple) and bool(item)
        # At the top every list and mapping is open; below, what is short stays on its line.
        if not nested or (depth > 0 and len(head) + len(flow) < WIDTH):
            lines.append(f"{head} {flow}{_told(str(key), item)}")
        elif isinstance(item, Mapping):
            lines += [head, *_mapping(item, f"{indent}  ", depth + 1)]
        else:
            lines += [head, *(f"{indent}  - {_flow(entry)}" for entry in item)]
    return lines


def _told(key: str, item: Any) -> str:
    is_size = key.endswith("_bytes") and isinstance(item, int) and not isinstance(item, bool)
    return f"  # {format_size(item)}" if is_size else ""


def _flow(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(k))}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value, allow_nan=False)
    raise ValueError(f"a {type(value).__name__} is not a plain value")


def _text(text: str) -> str:
    if _BARE.match(text) and text.casefold() not in _WORDS:
        return text
    return '"' + "".join(_character(c) for c in text) + '"'


def _character(c: str) -> str:
    if c in _ESCAPED:
        return _ESCAPED[c]
    if _RAW.match(c):
        return c
    number = ord(c)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
