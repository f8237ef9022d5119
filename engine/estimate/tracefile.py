"""Traces as bytes: a header in JSON, the events as they are, both compressed. Nothing in it is executed when read."""

from __future__ import annotations

import itertools
import json
import lzma
import sys
from array import array
from typing import Any

from engine.estimate.trace import EVENT_TYPE, Alternative, Trace, TracedComponent, TracedModule, Weight, Work

_MAGIC = b"dg-run trace 1\n"
_MAX_TABLE_BYTES = 16 * 1024**2
_MAX_EVENT_BYTES = 256 * 1024**2
"""What a trace may unpack to: a damaged or hostile file is refused, not filled into memory."""
_PRESET = 6
_MAX_PACKER_BYTES = 32 * 1024**2
"""What unpacking itself may take; the preset's dictionary is 8 MiB."""
_DAMAGE = (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError, lzma.LZMAError, EOFError)


class BadTrace(ValueError):
    """Bytes that are not a trace of this version."""


def dump(trace: Trace) -> bytes:
    """Return a trace as bytes."""
    numbers: dict[int, int] = {}  # storages are addresses while a trace is made: in a file they are counted
    streams = [trace.events, *(a.events for a in trace.alternatives)]
    header = {
        "pipeline_class": trace.pipeline_class,
        "components": [_component(c, numbers) for c in trace.components],
        "offload_chain": trace.offload_chain,
        "offload_excluded": trace.offload_excluded,
        "sizes": trace.sizes,
        "paths": trace.paths,
        "phases": trace.phases,
        "works": trace.works,
        "gone": [numbers[storage] for storage in trace.gone],
        "alternatives": [[a.name, a.start, a.end, a.outputs] for a in trace.alternatives],
        "asked_steps": trace.asked_steps,
        "usual_steps": trace.usual_steps,
        "basis": trace.basis,
        "assumptions": trace.assumptions,
        "lengths": [len(s) for s in streams],
    }
    table = lzma.compress(json.dumps(header, separators=(",", ":")).encode(), preset=_PRESET)
    events = lzma.compress(b"".join(_little(s).tobytes() for s in streams), preset=_PRESET)
    return _MAGIC + len(table).to_bytes(4, "little") + table + events


def load(content: bytes) -> Trace:
    """Return the trace in bytes. Raises: BadTrace."""
    if not content.startswith(_MAGIC):
        raise BadTrace("this is not a trace of this version")
    try:
        start = len(_MAGIC) + 4
        length = int.from_bytes(content[len(_MAGIC) : start], "little")
        header = json.loads(_unpacked(content[start : start + length], _MAX_TABLE_BYTES))
        streams = _streams(_unpacked(content[start + length :], _MAX_EVENT_BYTES), header["lengths"])
        return Trace(
            pipeline_class=header["pipeline_class"],
            components=tuple(_read_component(c) for c in header["components"]),
            offload_chain=tuple(header["offload_chain"]),
            offload_excluded=tuple(header["offload_excluded"]),
            events=streams[0],
            sizes=tuple(header["sizes"]),
            paths=tuple(header["paths"]),
            phases=tuple(header["phases"]),
            gone=tuple(header["gone"]),
            works=tuple(Work(k, d, tuple(dims), moved) for k, d, dims, moved in header["works"]),
            alternatives=tuple(
                Alternative(name=n, start=s, end=e, events=events, outputs=tuple((a, b) for a, b in outputs))
                for (n, s, e, outputs), events in zip(header["alternatives"], streams[1:], strict=True)
            ),
            asked_steps=header["asked_steps"],
            usual_steps=header["usual_steps"],
            basis=header["basis"],
            assumptions=tuple(header["assumptions"]),
        )
    except _DAMAGE as error:
        raise BadTrace(f"this trace is damaged: {error}") from error


def _unpacked(content: bytes, most: int) -> bytes:
    unpacker = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MAX_PACKER_BYTES)
    found = unpacker.decompress(content, most)
    if not unpacker.eof:
        raise BadTrace("this trace is cut off, or larger than any trace")
    return found


def _streams(packed: bytes, lengths: list[int]) -> list[array[int]]:
    """Return the streams of events that follow one another. Raises: BadTrace, where they are not all that is there."""
    events = array(EVENT_TYPE)
    events.frombytes(packed)
    events = _little(events)
    if any(n < 0 for n in lengths) or sum(lengths) != len(events):
        raise BadTrace("this trace has not the events that it says")
    ends = list(itertools.accumulate(lengths, initial=0))
    return [events[start:end] for start, end in itertools.pairwise(ends)]


def _little(events: array[int]) -> array[int]:
    """Return events in little-endian order, whatever this machine's own is."""
    if sys.byteorder == "big":
        events = array(EVENT_TYPE, events)
        events.byteswap()
    return events


def _component(component: TracedComponent, numbers: dict[int, int]) -> list[Any]:
    modules = [
        [
            m.path,
            int(m.is_castable) + 2 * int(m.is_layer),
            [
                [
                    w.name,
                    numbers.setdefault(w.storage, len(numbers)),
                    w.size_bytes,
                    int(w.is_buffer) + 2 * int(w.is_saved),
                    w.dtype,
                ]
                for w in m.weights
            ],
        ]
        for m in component.modules
    ]
    return [component.name, modules, component.blocks]


def _read_component(content: list[Any]) -> TracedComponent:
    name, modules, blocks = content
    return TracedComponent(
        name=name,
        blocks=tuple(tuple(b) for b in blocks),
        modules=tuple(
            TracedModule(
                path=path,
                is_castable=bool(marks & 1),
                is_layer=bool(marks & 2),
                weights=tuple(
                    Weight(
                        name=n,
                        storage=number,
                        size_bytes=size,
                        is_buffer=bool(flags & 1),
                        is_saved=bool(flags & 2),
                        dtype=dtype,
                    )
                    for n, number, size, flags, dtype in weights
                ),
            )
            for path, marks, weights in modules
        ),
    )
