"""Placements replayed over traces small enough to be checked by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from engine.estimate import pinned, placements, stream
from engine.estimate.trace import Builder, Trace, TracedComponent, TracedModule, Weight


def module(path: str, *sizes: int, buffers: tuple[int, ...] = (), saved: bool = True) -> TracedModule:
    """Return a module that owns parameters and buffers of these sizes."""
    base = hash(path) % 10**6 * 100
    weights = [Weight(name=f"w{i}", storage=base + i, size_bytes=s, is_buffer=False) for i, s in enumerate(sizes)]
    weights += [
        Weight(name=f"b{i}", storage=base + 50 + i, size_bytes=s, is_buffer=True, is_saved=saved)
        for i, s in enumerate(buffers)
    ]
    return TracedModule(path=path, weights=tuple(weights))


def component(name: str, *modules: TracedModule, blocks: tuple[tuple[str, ...], ...] = ()) -> TracedComponent:
    return TracedComponent(name=name, modules=modules, blocks=blocks)


def run(*path: str) -> Builder:
    """Return the events of nested modules in order: "a" begins, "/a" ends, a number is an activation's size."""
    made = Builder()
    alive: dict[str, int] = {}
    for step in path:
        if step.isdecimal():
            alive[step] = made.born(int(step))
        elif step.startswith("-"):
            made.died(alive.pop(step[1:]))
        elif step.startswith("="):
            made.phase(step[1:])
        elif step.startswith("/"):
            made.end(step[1:])
        else:
            made.begin(step)
    return made


def trace(components: list[TracedComponent], *path: str, excluded: tuple[str, ...] = ()) -> Trace:
    return Trace(
        pipeline_class="Toy",
        components=tuple(components),
        offload_chain=tuple(c.name for c in components if c.name not in excluded),
        offload_excluded=excluded,
        **run(*path).tables(),
    )


TEXT = component("text", module("text.a", 100))
NET = component("net", module("net.a", 1000), module("net.b", 2000, buffers=(10,)))
VAE = component("vae", module("vae.a", 300))
ONCE = ("=encode", "text", "text.a", "5", "/text.a", "/text")
STEP = ("net", "net.a", "40", "/net.a", "net.b", "7", "-40", "/net.b", "-7", "/net")
LAST = ("=decode", "vae", "vae.a", "60", "/vae.a", "/vae", "-60", "-5")
WHOLE = (*ONCE, "=denoise", *STEP, *STEP, *LAST)


def by_phase(toy: Trace, placement: placements.Placement, granule_bytes: int = 1) -> dict[str, int]:
    return {p.name: p.peak_bytes for p in stream.peaks(stream.build(toy, placement), granule_bytes)}


def most(toy: Trace, placement: placements.Placement, granule_bytes: int = 1) -> int:
    return max(by_phase(toy, placement, granule_bytes).values())


def kept(placement: placements.Placement) -> int:
    return placement.bytes_of(placement.resident())


def test_resident() -> None:
    toy = trace([TEXT, NET, VAE], *WHOLE)
    weights = 100 + 3010 + 300
    assert by_phase(toy, placements.Resident(toy)) == {
        "load": weights,
        "encode": weights + 5,
        "denoise": weights + 5 + 47,
        "decode": weights + 5 + 60,
    }


def test_model_offload_frees_the_predecessor_before_the_next_comes() -> None:
    toy = trace([TEXT, NET, VAE], *WHOLE)
    found = by_phase(toy, placements.ModelOffload(toy))
    assert found == {"load": 0, "encode": 105, "denoise": 3010 + 5 + 47, "decode": 3015}


def test_model_offload_keeps_what_is_not_the_direct_predecessor() -> None:
    """Image to image: the VAE encodes while the text encoder is there, and both the VAE and the net stay to the end."""
    first = ("vae", "vae.a", "/vae.a", "/vae")
    toy = trace([TEXT, NET, VAE], *ONCE, "=encode.2", *first, "=denoise", *STEP, *LAST)
    found = by_phase(toy, placements.ModelOffload(toy))
    assert found["encode.2"] == 100 + 300 + 5
    assert found["denoise"] == 300 + 3010 + 5 + 47


def test_a_later_call_begins_with_what_the_first_one_left() -> None:
    """A table of 31 bytes, made and kept by the net: the second time it is there while the text is encoded."""
    text = component("text", module("text.a", 5000))
    once = ("=denoise", "net", "net.a", "31", "/net.a", "/net")
    toy = trace([text, NET, VAE], *ONCE, *once, *LAST)
    made = stream.build(toy, placements.ModelOffload(toy))
    assert stream.peak_bytes(stream.peaks(made, 1)) == 5000 + 5
    assert stream.later_peak_bytes(made, 1) == 5000 + 5 + 31
    nothing_left = trace([text, NET, VAE], *WHOLE)
    made = stream.build(nothing_left, placements.ModelOffload(nothing_left))
    assert stream.later_peak_bytes(made, 1) == stream.peak_bytes(stream.peaks(made, 1))


def test_an_excluded_component_is_there_for_good() -> None:
    checker = component("checker", module("checker.a", 50))
    toy = trace([TEXT, NET, VAE, checker], *WHOLE, excluded=("checker",))
    assert by_phase(toy, placements.ModelOffload(toy))["encode"] == 100 + 5 + 50
    assert by_phase(toy, placements.SequentialOffload(toy))["encode"] == 100 + 5 + 50 + 10


def test_sequential_offload_fetches_layer_by_layer_and_keeps_buffers() -> None:
    toy = trace([TEXT, NET, VAE], *WHOLE)
    assert by_phase(toy, placements.SequentialOffload(toy)) == {
        "load": 10,
        "encode": 10 + 100 + 5,
        "denoise": 10 + 2000 + 5 + 47,
        "decode": 10 + 300 + 5 + 60,
    }


def test_sequential_offload_fetches_buffers_of_a_component_that_owns_parameters() -> None:
    net = component("net", module("net", 4), module("net.b", 20, buffers=(7,)))
    toy = trace([net], "net", "net.b", "/net.b", "/net")
    assert most(toy, placements.SequentialOffload(toy)) == 4 + 20 + 7
    net = component("net", module("net", 4), module("net.b", 20, buffers=(7,), saved=False))
    toy = trace([net], "net", "net.b", "/net.b", "/net")
    assert kept(placements.SequentialOffload(toy)) == 7


def test_a_leaf_group_is_a_modules_own_weights() -> None:
    toy = trace([TEXT, NET, VAE], *WHOLE)
    found = by_phase(toy, placements.GroupOffload(toy, use_stream=False))
    assert found["denoise"] == 2010 + 5 + 47


def test_with_a_stream_the_next_group_comes_early_from_the_second_forward_on() -> None:
    first = trace([NET], *STEP)
    assert most(first, placements.GroupOffload(first)) == 2010 + 47
    twice = trace([NET], *STEP, *STEP)
    # The first group is there with its successor while it computes: 1000 + 2010 + the activation of 40.
    assert most(twice, placements.GroupOffload(twice)) == 1000 + 2010 + 40


BLOCKS = component(
    "net",
    module("net.pos", buffers=(6,)),
    module("net.blocks.0.a", 100),
    module("net.blocks.1.a", 200),
    module("net.blocks.2.a", 400),
    module("net.out", 30),
    blocks=(("net.blocks.0", "net.blocks.1", "net.blocks.2"),),
)


def forward() -> tuple[str, ...]:
    inner: list[str] = []
    for i in range(3):
        inner += [f"net.blocks.{i}", f"net.blocks.{i}.a", f"/net.blocks.{i}.a", f"/net.blocks.{i}"]
    return ("net", *inner, "net.out", "/net.out", "/net")


@pytest.mark.parametrize(
    ("blocks_per_group", "use_stream", "forwards", "largest"),
    [(1, False, 2, 400), (2, False, 2, 400), (3, False, 2, 700), (1, True, 1, 400), (1, True, 2, 200 + 400)],
)
def test_blocks_come_in_groups(blocks_per_group: int, use_stream: bool, forwards: int, largest: int) -> None:
    toy = trace([BLOCKS], *(forward() * forwards))
    placement = placements.GroupOffload(toy, block_level=True, use_stream=use_stream, blocks_per_group=blocks_per_group)
    # What is in no list is there for the whole forward, its modules' buffers twice from the second forward on.
    assert most(toy, placement) == 30 + forwards * 6 + largest


@pytest.mark.parametrize(("forwards", "expected"), [(1, 2010), (2, 1000 + 2010), (3, 1000 + 2010 + 2000)])
def test_a_group_that_is_there_is_fetched_ahead_all_the_same(forwards: int, expected: int) -> None:
    """`net.a` is called twice in a forward and fetches `net.b` both times, which then stays into the next forward.

    There each of its tensors is copied anew before the old one goes: the larger is there twice for a moment.
    """
    one = ("net", "net.a", "/net.a", "net.b", "/net.b", "net.a", "/net.a", "/net")
    toy = trace([NET], *(one * forwards))
    assert most(toy, placements.GroupOffload(toy)) == expected


def test_what_streamed_groups_take_is_in_the_pool_of_the_copies_from_the_first_forward_on() -> None:
    toy = trace([NET], *STEP, *STEP)
    made = stream.build(toy, placements.GroupOffload(toy))
    assert set(made.aside) == {k for k in range(1, len(made.sizes)) if made.kinds[k] == stream.WEIGHT}
    made = stream.build(toy, placements.GroupOffload(toy, use_stream=False))
    assert not made.aside


def test_an_offload_keeps_a_component_that_another_placement_holds() -> None:
    """The VAE is there from the start; the net's predecessor goes, and nothing comes in the net's place."""
    toy = placements.keeping(trace([TEXT, NET, VAE], *WHOLE), ["vae"])
    found = by_phase(toy, placements.ModelOffload(toy))
    assert found == {"load": 300, "encode": 300 + 105, "denoise": 300 + 3010 + 5 + 47, "decode": 300 + 3010 + 5 + 60}
    assert by_phase(toy, placements.SequentialOffload(toy)) == {
        "load": 310,
        "encode": 310 + 100 + 5,
        "denoise": 310 + 2000 + 5 + 47,
        "decode": 310 + 5 + 60,
    }


def test_a_component_of_the_chain_is_moved_even_where_its_class_excludes_it() -> None:
    toy = dataclasses.replace(trace([TEXT, NET, VAE], *WHOLE), offload_excluded=("vae",))
    assert by_phase(toy, placements.ModelOffload(toy))["load"] == 0


def test_components_are_grouped_each_in_its_own_way() -> None:
    toy = trace([TEXT, BLOCKS, VAE], *ONCE, "=denoise", *forward(), *forward(), *LAST)
    how = {
        "text": placements.Grouping(use_stream=False),
        "net": placements.Grouping(block_level=True),
        "vae": None,
    }
    mixed = placements.GroupOffload(toy, groupings=how)
    assert by_phase(toy, mixed) == {
        "load": 300,
        "encode": 300 + 100 + 5,
        "denoise": 300 + 5 + 30 + 2 * 6 + 200 + 400,
        "decode": 300 + 5 + 60,
    }
    assert mixed.bytes_of(mixed.pinned()) == 100 + 200 + 400  # the net's blocks, and nothing else
    assert [mixed.brings_back(n) for n in how] == [True, False, False]


def test_groups_that_are_pinned_in_turn_keep_no_pinned_copies() -> None:
    """What is on the device is the same; of the host's blocks as many of each size are kept as one group wants."""
    toy = trace([NET, VAE], *STEP, *STEP, *LAST[:-1])
    low = placements.GroupOffload(toy, low_cpu_mem_usage=True)
    assert low.pinned() == ()
    assert [low.bytes_of(g) for g in low.pinned_in_turn()] == [1000, 2010, 300]
    assert pinned.pinned_in_turn_bytes([[1000], [2000, 10], [300]]) == 1024 + 2048 + 16 + 512
    assert pinned.pinned_in_turn_bytes([[1000, 900], [1024], [0]]) == 2 * 1024
    usual = placements.GroupOffload(toy)
    assert by_phase(toy, low) == by_phase(toy, usual)
    fresh = placements.GroupOffload(toy, low_cpu_mem_usage=True)
    moves = [m.verb for path in ("net", "net.a") for m in fresh.begin(path)]
    assert moves == [placements.PIN, placements.FETCH, placements.WAIT]


def test_a_group_that_never_comes_is_never_pinned_in_turn() -> None:
    toy = trace([NET, VAE], *STEP)
    assert [*placements.GroupOffload(toy, low_cpu_mem_usage=True).pinned_in_turn()] == [(0,), (1, 2)]


CAST = component(
    "net",
    TracedModule(
        path="net.a",
        weights=(Weight(name="w", storage=1, size_bytes=1000, is_buffer=False),),
        is_castable=True,
    ),
    module("net.b", 30),
)


@pytest.mark.parametrize(
    ("placement", "others"),
    [
        (placements.Resident, 30),
        (placements.ModelOffload, 30),
        (placements.SequentialOffload, 0),
        (placements.GroupOffload, 0),
    ],
)
def test_a_layer_is_widened_while_it_computes_wherever_its_weights_are(placement: Any, others: int) -> None:
    """At its end the narrow copy is made before the wide one goes: 1000 + 250, and the activation of 40."""
    toy = trace([CAST], "net", "net.a", "40", "/net.a", "net.b", "/net.b", "/net")
    casting = placements.Casting(storage="float8_e4m3fn", compute="float32")
    assert most(toy, placement(toy, casting)) == 1000 + 250 + 40 + others


def test_text_encoders_are_cast_by_the_paths_of_their_layers() -> None:
    """The embedding, norms and T5's `wo` are left alone; so is what is no layer."""
    paths = [
        "shared",
        "block.0.layer.0.SelfAttention.q",
        "block.0.layer.1.DenseReluDense.wo",
        "block.0.layer_norm",
        "x",
    ]
    modules = [module(f"text_encoder.{p}", 1000) for p in paths]
    layers = [dataclasses.replace(m, is_layer=not m.path.endswith("x")) for m in modules]
    text = component("text_encoder", *layers)
    casting = placements.Casting(storage="float8_e4m3fn", compute="float32", components=("text_encoder", "net"))
    placement = placements.Resident(trace([text, CAST]), casting)
    assert sorted(placement.casts) == ["net.a", "text_encoder.block.0.layer.0.SelfAttention.q"]
    assert sorted(placements.Resident(trace([text, CAST]), dataclasses.replace(casting, components=None)).casts) == [
        "net.a"
    ]
    assert kept(placement) == 4 * 1000 + 250 + 250 + 30
    staged = placements.StagedEncoding(trace([text, CAST]), functools.partial(placements.Resident, casting=casting))
    assert kept(staged) == 4 * 1000 + 250


def test_at_leaf_level_what_a_vae_itself_owns_never_comes() -> None:
    """Its `decode` bypasses the hook on its forward."""
    vae = component("vae", module("vae", buffers=(16,)), module("vae.a", 300))
    toy = trace([vae], "vae", "vae.a", "60", "/vae.a", "/vae")
    assert most(toy, placements.GroupOffload(toy)) == 300 + 60


def test_at_block_level_the_vae_is_resident() -> None:
    toy = trace([NET, VAE], *STEP)
    assert kept(placements.GroupOffload(toy, block_level=True)) == 300


def test_tied_weights_count_once_where_they_are_one_storage_and_twice_where_each_owner_fetches_its_own() -> None:
    tied = Weight(name="w", storage=1, size_bytes=100, is_buffer=False)
    text = component("text", TracedModule(path="text.a", weights=(tied,)), TracedModule(path="text.b", weights=(tied,)))
    toy = trace([text], "text", "text.a", "text.b", "/text.b", "/text.a", "/text")
    assert most(toy, placements.Resident(toy)) == 100
    assert most(toy, placements.SequentialOffload(toy)) == 200


def test_sizes_are_rounded_as_the_allocator_rounds_them() -> None:
    toy = trace([TEXT], "text", "text.a", "513", "/text.a", "/text")
    assert most(toy, placements.Resident(toy), 512) == 512 + 1024


ENCODER = component("text_encoder", module("text_encoder.a", 100))
ENCODER_2 = component("text_encoder_2", module("text_encoder_2.a", 4000))
ENCODED = (
    *("=encode", "text_encoder", "text_encoder.a", "5", "/text_encoder.a", "/text_encoder"),
    *("text_encoder_2", "text_encoder_2.a", "6", "/text_encoder_2.a", "/text_encoder_2", "-6"),
)
STAGED = [ENCODER, ENCODER_2, NET, VAE]


def test_staged_encoding_holds_the_encoders_first_and_then_the_rest() -> None:
    toy = trace(STAGED, *ENCODED, "=denoise", *STEP, *STEP, *LAST)
    assert by_phase(toy, placements.StagedEncoding(toy)) == {
        "load": 100 + 4000,
        "encode": 100 + 4000 + 5 + 6,
        # The encoders go, with the activation of 5 that outlives them and waits on the host; the net and the VAE come,
        # and then what was encoded.
        "load.2": max(4100, 3010 + 300 + 5),
        "denoise": 3010 + 300 + 5 + 47,
        "decode": 3010 + 300 + 5 + 60,
    }


def test_staged_encoding_empties_the_cache_before_the_rest_comes() -> None:
    toy = trace(STAGED, *ENCODED, "=denoise", *STEP)
    made = stream.build(toy, placements.StagedEncoding(toy))
    # Keys count from 1: the encoders' two weights (1, 2), what they computed (3, 4), then the rest (5 to 8), and again
    # what was computed (3, now 9).
    assert made.events[:5] == [1, 2, 3, 4, -4]
    assert made.events[5:14] == [-3, -1, -2, 0, 5, 6, 7, 8, 9]
    assert [made.sizes[k] for k in (1, 2, 5, 6, 7, 8, 9)] == [100, 4000, 1000, 2000, 10, 300, 5]


@pytest.mark.parametrize(
    ("rest", "denoise", "decode"),
    [
        # The net is brought whole, then the VAE in its place.
        (placements.ModelOffload, 3010 + 5 + 47, 3010 + 5),
        # A layer at a time beside the buffer of 10, or with its own buffer.
        (placements.SequentialOffload, 10 + 2000 + 5 + 47, 10 + 300 + 5 + 60),
        (functools.partial(placements.GroupOffload, use_stream=False), 2010 + 5 + 47, 300 + 5 + 60),
        # From the second step on the next group is there early.
        (placements.GroupOffload, 1000 + 2010 + 5 + 40, 300 + 5 + 60),
    ],
)
def test_after_staged_encoding_the_rest_is_placed_as_it_would_be(rest: Any, denoise: int, decode: int) -> None:
    small = component("text_encoder", module("text_encoder.a", 100))
    toy = trace([small, NET, VAE], *ENCODED[:6], "=denoise", *STEP, *STEP, *LAST)
    found = by_phase(toy, placements.StagedEncoding(toy, rest))
    loading = max(100, kept(rest(trace([NET, VAE], *STEP))) + 5)
    assert found == {"load": 100, "encode": 105, "load.2": loading, "denoise": denoise, "decode": decode}


def test_a_text_encoder_that_comes_after_a_picture_was_encoded_is_there_for_that_once() -> None:
    first = ("=encode", "vae", "vae.a", "/vae.a", "/vae")
    again = ("=encode.2", *ENCODED[1:6])
    toy = trace([ENCODER, NET, VAE], *first, *again, "=denoise", *STEP)
    found = by_phase(toy, placements.StagedEncoding(toy))
    assert found["encode.2"] == 3010 + 300 + 100 + 5
    assert found["denoise"] == 3010 + 300 + 5 + 47


def test_staged_encoding_without_text_encoders_is_the_rest_alone() -> None:
    toy = trace([NET, VAE], *STEP)
    assert by_phase(toy, placements.StagedEncoding(toy)) == by_phase(toy, placements.Resident(toy))


def test_casts_and_pinned_copies_are_those_of_the_rest() -> None:
    net = component("net", TracedModule(path="net.a", weights=module("net.a", 1000).weights, is_castable=True))
    toy = trace([ENCODER, net], *ENCODED[:6], "=denoise", "net", "net.a", "/net.a", "/net")
    half = placements.Casting(storage="float16", compute="float32")
    found = by_phase(toy, placements.StagedEncoding(toy, functools.partial(placements.Resident, casting=half)))
    # Kept in 500 bytes, widened to 1000 beside them; the activation of 5 stays.
    assert found["denoise"] == 5 + 500 + 1000
    streamed = placements.StagedEncoding(toy, placements.GroupOffload)
    assert streamed.bytes_of(streamed.pinned()) == 1000
