"""Traces as bytes and back, what damage does to them, and the other ways that are spliced in."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import lzma
import random
import sys
import tracemalloc
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.estimate import tracefile
from engine.estimate.trace import (
    BORN,
    DIED,
    EVENT_TYPE,
    KIND_BITS,
    KIND_MASK,
    Alternative,
    Builder,
    Trace,
    TracedModule,
    Work,
)
from engine.estimate.tracefile import BadTrace
from tests import toys


def renumbered(trace: Trace) -> Trace:
    """Return a trace as a file gives it back: storages of weights counted from 0 in the order they are met."""
    numbers: dict[int, int] = {}

    def module(m: TracedModule) -> TracedModule:
        weights = [dataclasses.replace(w, storage=numbers.setdefault(w.storage, len(numbers))) for w in m.weights]
        return dataclasses.replace(m, weights=tuple(weights))

    components = [dataclasses.replace(c, modules=tuple(map(module, c.modules))) for c in trace.components]
    gone = tuple(numbers[storage] for storage in trace.gone)
    return dataclasses.replace(trace, components=tuple(components), gone=gone)


def whole() -> Trace:
    """Return a trace in which every field says something, with two alternatives and a tied weight."""
    made = Builder()
    made.phase("decode")
    first = made.born(1000)
    start = len(made.events)
    with made.aside() as tiled:
        made.begin("vae")
        made.work(Work("conv", "float16", (1, 4, 8, 1, 0, 9, 9, 3, 3, 1, 1, 1, 1, 9, 9), 77))
        made.born(30)
        made.end("vae")
    made.begin("vae")
    kept = made.born(300)
    made.end("vae")
    end = len(made.events)
    made.died(first)
    made.gone(140_001)
    made.step()
    made.died(kept)
    for name in ("tiled", "sliced"):
        made.alternatives.append(Alternative(name=name, start=start, end=end, events=tiled, outputs=((kept, 1),)))
    a = toys.weight(140_001, 8, dtype="bfloat16")
    b = toys.weight(140_002, 16, is_buffer=True, is_saved=False)
    modules = TracedModule(path="vae.x", weights=(a, b), is_castable=True), TracedModule(path="vae.y", weights=(a,))
    vae = toys.component("vae", *modules, blocks=(("vae.x", "vae.y"), ()))
    more = {
        "offload_excluded": ("vae",),
        "asked_steps": 3,
        "usual_steps": 9,
        "basis": "component",
        "assumptions": ("the step Ünsinn",),
    }
    return toys.trace(made, vae, **more)


def test_every_field_comes_back() -> None:
    trace = whole()
    usual = {f.name: f.default for f in dataclasses.fields(Trace) if f.default is not dataclasses.MISSING}
    assert all(getattr(trace, name) != value for name, value in usual.items())
    back = tracefile.load(tracefile.dump(trace))
    assert back == renumbered(trace)
    assert back.events.typecode == EVENT_TYPE
    assert tracefile.dump(back) == tracefile.dump(trace)
    assert back.component("vae").weights()[0].storage == back.component("vae").modules[1].weights[0].storage


@given(toys.traces())
def test_any_trace_comes_back(trace: Trace) -> None:
    assert tracefile.load(tracefile.dump(trace)) == renumbered(trace)


def test_a_machine_of_the_other_byte_order_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a machine writes is what this one would with every event's four bytes turned round."""
    trace = whole()
    turned = dataclasses.replace(trace, events=array(EVENT_TYPE, trace.events), alternatives=())
    turned.events.byteswap()
    other = "big" if sys.byteorder == "little" else "little"
    monkeypatch.setattr(sys, "byteorder", other)
    written = tracefile.dump(dataclasses.replace(trace, alternatives=()))
    assert tracefile.load(written).events == trace.events
    monkeypatch.undo()
    assert tracefile.load(written).events == turned.events


CONTENT = tracefile.dump(whole())
START = len(b"dg-run trace 1\n")


def test_a_trace_cut_off_anywhere_is_refused() -> None:
    for length in range(len(CONTENT)):
        with pytest.raises(BadTrace):
            tracefile.load(CONTENT[:length])


def test_a_changed_byte_is_refused_or_changes_nothing() -> None:
    """Both parts carry checksums, and what is behind them is nobody's."""
    for place, bit in itertools.product(range(len(CONTENT)), (1, 128)):
        changed = bytearray(CONTENT)
        changed[place] ^= bit
        try:
            assert tracefile.load(bytes(changed)) == tracefile.load(CONTENT)
        except BadTrace:
            continue


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused(content: bytes, has_beginning: bool) -> None:
    with pytest.raises(BadTrace):
        tracefile.load(CONTENT[:START] * has_beginning + content)


def packed(header: Any, events: bytes) -> bytes:
    table = lzma.compress(header if isinstance(header, bytes) else json.dumps(header).encode())
    return CONTENT[:START] + len(table).to_bytes(4, "little") + table + lzma.compress(events)


def header_of(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[START : START + 4], "little")
    found: dict[str, Any] = json.loads(lzma.decompress(content[START + 4 : START + 4 + length]))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(header_of(CONTENT))), JSON)
def test_a_table_with_anything_in_the_place_of_a_part_is_read_or_refused(key: str, value: Any) -> None:
    with contextlib.suppress(BadTrace):
        assert isinstance(tracefile.load(packed(header_of(CONTENT) | {key: value}, b"")), Trace)


@pytest.mark.parametrize("header", [b"{", b"[" * 100_000, b"\xff", b"[]", b"null", b'"x"', b"{}", b'{"lengths": 5}'])
def test_a_table_that_is_none_is_refused(header: bytes) -> None:
    with pytest.raises(BadTrace):
        tracefile.load(packed(header, b""))


@pytest.mark.parametrize("lengths", [[], [1], [9, -1], [-1], [3], ["8"], [8.0], [10**30], [4, 4, 4]])
def test_lengths_that_are_not_the_events_are_refused(lengths: list[Any]) -> None:
    """32 bytes are eight events, of one stream and two alternatives: [8, 0, 0] would be right."""
    right = header_of(CONTENT)
    assert tracefile.load(packed(right | {"lengths": [8, 0, 0]}, bytes(32))).events == array(EVENT_TYPE, [0] * 8)
    with pytest.raises(BadTrace):
        tracefile.load(packed(right | {"lengths": lengths}, bytes(32)))
    with pytest.raises(BadTrace):
        tracefile.load(packed(right | {"lengths": [8, 0, 0]}, bytes(33)))


@pytest.mark.parametrize("where", ["table", "events"])
def test_a_bomb_is_refused_in_bounded_memory(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB packed into 64 KiB, where 1 MiB is the most: with the true bounds the ratio is the same."""
    monkeypatch.setattr(tracefile, f"_MAX_{where.removesuffix('s').upper()}_BYTES", 2**20)
    filler = bytes(64 * 2**20)
    bomb = packed(filler, b"") if where == "table" else packed(header_of(CONTENT), filler)
    del filler
    tracemalloc.start()
    try:
        with pytest.raises(BadTrace, match="larger than any trace"):
            tracefile.load(bomb)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20  # the packer's dictionary is 8 MiB
    finally:
        tracemalloc.stop()


def test_the_bounds_leave_room_for_any_trace() -> None:
    """A hundred thousand events are 0.4 MB."""
    assert 2**20 < tracefile._MAX_TABLE_BYTES <= 2**24
    assert 2**24 < tracefile._MAX_EVENT_BYTES <= 2**28


# Other ways.


def told(trace: Trace) -> list[str]:
    return [f"{e.sign}{e.name or e.number}" if e.sign in "+-=<>" else e.sign for e in trace.told()]


def test_another_way_stands_in_for_its_stretch_and_its_outputs_die_where_the_plain_ones_did() -> None:
    """Plain: 0 is there before, 1 is made and let go of within, 2 comes out. Tiled: 1 and 2 within, 3 comes out."""
    made = Builder()
    before = made.born(7)
    start = len(made.events)
    with made.aside() as tiled:
        one, two = made.born(10), made.born(11)
        made.died(one)
        out = made.born(12)
        made.died(two)
    inner, plain = made.born(100), made.born(200)
    made.died(inner)
    end = len(made.events)
    later = made.born(5)
    made.died(plain)
    made.died(before)
    made.died(later)
    made.alternatives.append(Alternative(name="tiled", start=start, end=end, events=tiled, outputs=((plain, out),)))
    trace = toys.trace(made)
    assert told(trace) == ["+0", "+1", "+2", "-1", "+3", "-2", "-0", "-3"]
    along = trace.along("tiled")
    assert told(along) == ["+0", "+1", "+2", "-1", "+3", "-2", "+4", "-3", "-0", "-4"]
    assert [e.size_bytes for e in along.told()] == [7, 10, 11, 10, 12, 11, 5, 12, 7, 5]
    assert along.alternatives == ()
    assert trace.along("sliced") is trace


def test_what_another_way_lets_go_of_does_not_die_again_after_it() -> None:
    """A cache of the VAE, that was there before and is emptied by either way: once in each."""
    made = Builder()
    cache = made.born(7)
    start = len(made.events)
    with made.aside() as tiled:
        made.died(cache)
    made.born(1)
    end = len(made.events)
    made.died(cache)
    made.alternatives.append(Alternative(name="tiled", start=start, end=end, events=tiled, outputs=()))
    assert told(toys.trace(made).along("tiled")) == ["+0", "-0"]


def with_alternatives(made: Builder, pick: random.Random, *, extra: int) -> Trace:
    """Return a trace with another way through up to two stretches: the same again, after `extra` short-lived storages.

    A death says how many births ago its storage was born: the extra ones push away what was born before the stretch.
    """
    cuts = sorted(pick.sample(range(len(made.events) + 1), min(4, len(made.events) + 1)))
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        before = born = sum(1 for w in made.events[:start] if w & KIND_MASK == BORN)
        alive: set[int] = set()
        events = array(EVENT_TYPE, [BORN, DIED] * extra)
        for word in made.events[start:end]:
            kind, ago = word & KIND_MASK, word >> KIND_BITS
            if kind == BORN:
                alive.add(born)
                born += 1
            elif kind == DIED:
                alive.discard(born - 1 - ago)
                word = (ago + extra * (born - 1 - ago < before)) << KIND_BITS | DIED
            events.append(word)
        outputs = tuple((n, n + extra) for n in sorted(alive))
        made.alternatives.append(Alternative(name="other", start=start, end=end, events=events, outputs=outputs))
    return toys.trace(made)


@given(toys.builders(balanced=True), st.randoms(use_true_random=False))
def test_splicing_in_the_plain_way_changes_nothing(made: Builder, pick: random.Random) -> None:
    trace = with_alternatives(made, pick, extra=0)
    assert trace.along("other").events == trace.events


@given(toys.builders(balanced=True), st.randoms(use_true_random=False))
def test_births_and_deaths_balance_along_another_way(made: Builder, pick: random.Random) -> None:
    assert toys.unbalanced(made.events) is None
    trace = with_alternatives(made, pick, extra=2)
    along = trace.along("other")
    assert toys.unbalanced(along.events) is None
    more = 2 * len(trace.alternatives)
    plain, other = [e.sign for e in trace.told()], [e.sign for e in along.told()]
    assert (other.count("+"), other.count("-")) == (plain.count("+") + more, plain.count("-") + more)
