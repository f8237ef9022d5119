"""What the allocator is asked for, in order: weights as they move and are widened, activations, workspaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.estimate import stream
from engine.estimate.placements import Casting, GroupOffload, ModelOffload, Placement, Resident, SequentialOffload
from engine.estimate.stream import ACTIVATION, WEIGHT, WORKSPACE, Stream, Taken
from engine.estimate.trace import Builder, Trace, TracedModule, Work
from tests import toys

FP8 = Casting(storage="float8_e4m3fn", compute="bfloat16")


def asked(made: Stream) -> list[str]:
    """Return the stream for reading: kind, sign and bytes of each event; "empty" where the cache is emptied."""
    letters = {WEIGHT: "w", ACTIVATION: "a", WORKSPACE: "x"}
    return [
        f"{letters[made.kinds[abs(n)]]}{'+' if n > 0 else '-'}{made.sizes[abs(n)]}" if n else "empty"
        for n in made.events
    ]


def run(*events: str | int | Work) -> Builder:
    """Return a run: "a" begins, "/a" ends, "=a" is a phase, "-N" lets go of storage N, a number is a birth's bytes."""
    made = Builder()
    for event in events:
        if isinstance(event, Work):
            made.work(event)
        elif isinstance(event, int):
            made.born(event)
        elif event[0] == "/":
            made.end(event[1:])
        elif event[0] == "=":
            made.phase(event[1:])
        elif event[0] == "-":
            made.died(int(event[1:]))
        else:
            made.begin(event)
    return made


def unet(*modules: TracedModule) -> Trace:
    """Return one forward of a net whose layers `a` and `b` make 40 and 7 bytes."""
    made = run("=denoise", "unet", "unet.a", 40, "/unet.a", "unet.b", 7, "-0", "/unet.b", "/unet")
    return toys.trace(made, toys.component("unet", *modules))


A = TracedModule(path="unet.a", weights=(toys.weight(1, 400), toys.weight(2, 80)), is_castable=True)
B = TracedModule(path="unet.b", weights=(toys.weight(3, 1000),))


def test_a_cast_layer_is_widened_to_compute_and_narrowed_after_one_tensor_at_a_time() -> None:
    """400 and 80 bytes of float32 are 100 and 20 in float8, 200 and 40 in bfloat16; the layer b is left alone."""
    trace = unet(A, B)
    assert asked(stream.build(trace, Resident(trace, FP8))) == [
        *("w+100", "w+20", "w+1000"),
        *("w+200", "w-100", "w+40", "w-20"),
        "a+40",
        *("w+100", "w-200", "w+20", "w-40"),
        *("a+7", "a-40"),
    ]


def test_a_cast_layers_peak_holds_both_widths_of_one_tensor() -> None:
    """At the narrowing: 1000 of b, 200 and 40 of a wide, the 100 that are made of the first, and 40 of activation."""
    trace = unet(A, B)
    (_, denoise) = stream.peaks(stream.build(trace, Resident(trace, FP8)), granule_bytes=1)
    assert (denoise.peak_bytes, denoise.weights_bytes, denoise.activation_bytes) == (1380, 1340, 40)


def test_under_sequential_offload_a_cast_layer_comes_narrow_is_widened_and_is_let_go_of_narrow() -> None:
    trace = unet(A)
    assert asked(stream.build(trace, SequentialOffload(trace, FP8))) == [
        *("w+100", "empty", "w+20", "empty"),
        *("w+200", "w-100", "w+40", "w-20"),
        "a+40",
        *("w+100", "w-200", "w+20", "w-40"),
        *("w-100", "w-20"),
        *("a+7", "a-40"),
    ]


@pytest.mark.parametrize("placement", [ModelOffload, GroupOffload])
def test_a_cast_layer_comes_narrow_with_its_component_or_group(placement: type[Placement]) -> None:
    trace = unet(A)
    assert asked(stream.build(trace, placement(trace, FP8)))[:6] == ["w+100", "w+20", "w+200", "w-100", "w+40", "w-20"]


def test_buffers_of_other_kinds_are_not_cast() -> None:
    module = TracedModule(
        path="unet.a", weights=(toys.weight(1, 400), toys.weight(2, 8, dtype="int64")), is_castable=True
    )
    trace = unet(module)
    assert asked(stream.build(trace, Resident(trace, FP8)))[:3] == ["w+100", "w+8", "w+200"]


def test_a_weight_that_two_cast_layers_share_is_kept_once() -> None:
    shared = [TracedModule(path=f"unet.{n}", weights=(toys.weight(1, 400),), is_castable=True) for n in "ab"]
    trace = unet(*shared)
    made = stream.build(trace, Resident(trace, FP8))
    assert asked(made) == [
        *("w+100", "w+200", "w-100", "a+40", "w+100", "w-200"),
        *("w+200", "w-100", "a+7", "a-40", "w+100", "w-200"),
    ]


def test_workspaces_live_while_their_operator_computes_and_those_for_good_are_taken_once() -> None:
    conv, product, other = (Work(kind, "float16", (), 0) for kind in ("conv", "matmul", "memory"))
    takes = {"conv": Taken(bytes=50, is_given_up=True), "matmul": Taken(bytes=3, for_good_bytes=(1000,))}
    trace = toys.trace(run("=denoise", product, 8, conv, product, other, conv, product))
    made = stream.build(trace, Resident(trace), lambda w: takes.get(w.kind, Taken()))
    assert asked(made) == [
        *("x+1000", "x+3", "x-3", "a+8", "x+50", "x-50", "x+3", "x-3", "x+50", "x-50", "x+3", "x-3"),
    ]
    assert [made.sizes[k] for k in sorted(made.optional)] == [50, 50]
    (_, denoise) = stream.peaks(made, granule_bytes=1)
    assert (denoise.peak_bytes, denoise.activation_bytes, denoise.workspace_bytes) == (1000 + 8 + 50, 8, 1050)


def test_each_phase_begins_where_its_name_was_and_loading_comes_before_all() -> None:
    trace = toys.trace(run(5, "=encode", 7, "=denoise", "-0", "=encode.2"), toys.component("unet", A))
    made = stream.build(trace, Resident(trace))
    assert made.marks == [(0, "load"), (3, "encode"), (4, "denoise"), (5, "encode.2")]
    found = stream.peaks(made, granule_bytes=1)
    assert [(p.name, p.peak_bytes) for p in found] == [
        ("load", 485),
        ("encode", 492),
        ("denoise", 492),
        ("encode.2", 487),
    ]
    assert stream.peak_bytes(found) == 492


def test_model_offload_empties_the_cache_after_what_it_sends_away() -> None:
    text = toys.component("text", TracedModule(path="text.a", weights=(toys.weight(9, 60),)))
    made = run("=encode", "text", 5, "/text", "=denoise", "unet", "/unet")
    trace = toys.trace(made, text, toys.component("unet", A))
    assert asked(stream.build(trace, ModelOffload(trace))) == ["w+60", "a+5", "w-60", "empty", "w+400", "w+80"]


def test_what_is_copied_ahead_is_allocated_on_the_stream_of_copies() -> None:
    """Second forward: `a` comes when the net begins, `b` while `a` computes; in the first both come in their turn."""
    forward = ("unet", "unet.a", "/unet.a", "unet.b", "/unet.b", "/unet")
    trace = toys.trace(run("=denoise", *forward, *forward), toys.component("unet", A, B))
    made = stream.build(trace, GroupOffload(trace))
    first = ["w+400", "w+80", "w-400", "w-80", "w+1000", "w-1000"]
    assert asked(made) == [*first, "w+400", "w+80", "w+1000", "w-400", "w-80", "w-1000"]
    assert [made.sizes[k] for k in sorted(made.aside)] == [400, 80, 1000] * 2
    assert stream.build(trace, GroupOffload(trace, use_stream=False)).aside == {}


PLACEMENTS: dict[str, Callable[[Trace, Casting | None], Placement]] = {
    "resident": Resident,
    "model": ModelOffload,
    "sequential": SequentialOffload,
    "leaf": GroupOffload,
    "leaf, no stream": lambda t, c: GroupOffload(t, c, use_stream=False),
    "blocks": lambda t, c: GroupOffload(t, c, block_level=True),
    "blocks, no stream": lambda t, c: GroupOffload(t, c, block_level=True, use_stream=False, blocks_per_group=2),
}


@pytest.mark.parametrize("name", PLACEMENTS)
@settings(max_examples=60)
@given(toys.traces(), st.sampled_from([None, FP8]))
def test_whatever_moves_is_let_go_of_once_and_never_before_it_came(
    name: str, trace: Trace, casting: Casting | None
) -> None:
    made = stream.build(trace, PLACEMENTS[name](trace, casting))
    here: set[int] = set()
    for event in made.events:
        if event > 0:
            assert event not in here
            here.add(event)
        elif event:
            here.remove(-event)
    births = sum(1 for e in trace.told() if e.sign == "+")
    assert sum(1 for e in made.events if e > 0 and made.kinds[e] == ACTIVATION) == births
    assert [name for _, name in made.marks] == ["load", *(e.name for e in trace.told() if e.sign == "=")]


def test_each_component_copies_on_a_stream_of_its_own() -> None:
    """Executed on the phantom device: what one's stream has reserved is never another's."""
    made = Builder()
    for name in ("text_encoder", "unet", "text_encoder"):
        made.begin(name)
        made.begin(f"{name}.a")
        made.end(f"{name}.a")
        made.end(name)
    parts = [
        toys.component(name, TracedModule(path=f"{name}.a", weights=(toys.weight(number, 1000),)))
        for number, name in enumerate(("text_encoder", "unet"), 1)
    ]
    trace = toys.trace(made, *parts)
    built = stream.build(trace, GroupOffload(trace))
    assert {built.owners[k]: n for k, n in built.aside.items()} == {"text_encoder": 1, "unet": 2}
