"""What diffusers' classes keep of pipelines that are gone: tables on the device, under `functools.lru_cache`.

Such a cache on a method belongs to the class, so what it keeps outlives the instance: the rotary embedding of
Qwen-Image keeps 4 MiB on the device for ever, and up to 128 tables more, a MiB or two each, one for each size of a
picture (diffusers 0.42, `models/transformers/transformer_qwenimage.py`). They are computed again when asked for.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator

_LIBRARY = "diffusers.models"
_Cached = functools._lru_cache_wrapper


def forget() -> None:
    """Let go of the tables that diffusers' models have been asked for, in this process."""
    for cached in _all():
        cached.cache_clear()


def _all() -> Iterator[_Cached[object]]:
    for name, module in tuple(sys.modules.items()):
        if not name.startswith(_LIBRARY) or module is None:
            continue
        for value in tuple(vars(module).values()):
            yield from _of(value)
            if isinstance(value, type) and value.__module__ == name:
                for method in tuple(vars(value).values()):
                    yield from _of(method)


def _of(value: object) -> Iterator[_Cached[object]]:
    """Yield the cache that a function is, or that it calls: `lru_cache_unless_export` wraps one."""
    if isinstance(value, _Cached):
        yield value
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                inner = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(inner, _Cached):
                yield inner
