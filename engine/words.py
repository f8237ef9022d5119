"""Small help with words: the nearest right one, and lists for reading."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Longer than this is no misspelt word, and comparing it takes time.
_LONGEST = 100
# Control characters, and those that turn the direction of what follows. Others that Python does not call printable
# (spaces of other scripts, joiners) are part of what people write.
_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Return up to `count` of the `known` words that `word` was probably meant to be, best first."""
    if len(word) > _LONGEST:
        return []
    by_folded = {k.casefold(): k for k in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=count, cutoff=0.6)
    return [by_folded[f] for f in found]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?", or the choices where there are few, or nothing."""
    choices = list(known)
    if found := nearest(word, choices):
        return f"did you mean {found[0]!r}?"
    return f"it can be {listing(choices, 'or')}" if 0 < len(choices) <= 12 else ""


def listing(words: Iterable[str], last: str = "and") -> str:
    """Return "a", "a and b", or "a, b and c"."""
    items = list(words)
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def printable(text: str) -> str:
    """Return a text as a terminal may be given it: what would move its cursor or change its title is written out."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def shown(value: object, most: int = 60) -> str:
    """Return a value's `repr`, cut where it is long."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else text[: most - 3] + "..."
