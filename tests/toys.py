"""Traces small enough to be worked out by hand, and strategies for random ones."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from engine.estimate.trace import (
    BORN,
    DIED,
    KIND_BITS,
    KIND_MASK,
    Builder,
    Trace,
    TracedComponent,
    TracedModule,
    Weight,
    Work,
)


def weight(storage: int, size_bytes: int, **more: Any) -> Weight:
    """Return a parameter in float32, unless `more` says otherwise."""
    usual: dict[str, Any] = {"name": "w", "is_buffer": False}
    return Weight(storage=storage, size_bytes=size_bytes, **usual | more)


def component(name: str, *modules: TracedModule, blocks: tuple[tuple[str, ...], ...] = ()) -> TracedComponent:
    return TracedComponent(name=name, modules=modules, blocks=blocks)


def trace(made: Builder, *components: TracedComponent, **more: Any) -> Trace:
    """Return what a builder collected as a trace whose components are offloaded in the order given."""
    usual = {"pipeline_class": "Toy", "offload_chain": tuple(c.name for c in components), "offload_excluded": ()}
    return Trace(**usual | {"components": components} | made.tables() | more)


def unbalanced(events: Any) -> str | None:
    """Return what is wrong with births and deaths, or None: each death is of a storage that was born and is alive."""
    alive: set[int] = set()
    born = 0
    for word in events:
        kind, payload = word & KIND_MASK, word >> KIND_BITS
        if kind == BORN:
            alive.add(born)
            born += 1
        elif kind == DIED:
            number = born - 1 - payload
            if number not in alive:
                return f"{number} dies and is not alive"
            alive.remove(number)
    return None


WORKS = st.one_of(
    st.builds(Work, st.just("memory"), st.just("float16"), st.just(()), st.integers(0, 10**9)),
    st.builds(Work, st.just("matmul"), st.sampled_from(["float32", "bfloat16"]), st.just((1, 64, 64, 64)), st.just(10)),
    st.just(Work("wait", "", (), 0)),
    st.just(Work("group_norm", "float32", (32,), 10**6)),
)
COMPONENTS = ("text_encoder", "unet", "vae")


@st.composite
def builders(draw: st.DrawFn, balanced: bool = False) -> Builder:
    """Random runs: components begin and end, storages are born and die, phases and steps pass."""
    made = Builder()
    alive = [made.born(draw(st.integers(0, 10**6)))]
    seen: list[str] = []
    for name in draw(st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=5)):
        seen.append(name)
        phase = {"text_encoder": "encode", "unet": "denoise", "vae": "decode"}[name]
        made.phase(phase if seen.count(name) == 1 else f"{phase}.{seen.count(name)}")
        made.begin(name)
        # The net's are blocks, which always run one after the other.
        leaves = ["a", "b"] if name == "unet" else draw(st.lists(st.sampled_from(["a", "b"]), max_size=3))
        for leaf in leaves:
            made.begin(f"{name}.{leaf}")
            for size in draw(st.lists(st.integers(0, 10**7), max_size=3)):
                alive.append(made.born(size))
            made.work(draw(WORKS))
            made.end(f"{name}.{leaf}")
            is_over: bool = draw(st.booleans())
            if alive and is_over:
                made.died(alive.pop(draw(st.integers(0, len(alive) - 1))))
        made.end(name)
        if name == "unet":
            made.step()
    for number in alive if balanced else ():
        made.died(number)
    return made


@st.composite
def components(draw: st.DrawFn) -> tuple[TracedComponent, ...]:
    """The weights of those runs: two modules a component, maybe cast, maybe tied, with a buffer now and then."""
    found = []
    for i, name in enumerate(COMPONENTS):
        modules = []
        for j, leaf in enumerate("ab"):
            sizes = draw(st.lists(st.integers(1, 10**7).map(lambda n: n * 4), min_size=1, max_size=3))
            weights = tuple(
                weight(
                    100 * i + 10 * j + k,
                    size,
                    name=f"w{k}",
                    is_buffer=draw(st.booleans()),
                    is_saved=draw(st.booleans()),
                    dtype=draw(st.sampled_from(["float32", "bfloat16", "int64"])),
                )
                for k, size in enumerate(sizes)
            )
            castable = name == "unet" and draw(st.booleans())
            modules.append(TracedModule(path=f"{name}.{leaf}", weights=weights, is_castable=castable))
        found.append(component(name, *modules, blocks=((f"{name}.a", f"{name}.b"),) if name == "unet" else ()))
    return tuple(found)


@st.composite
def traces(draw: st.DrawFn, balanced: bool = False) -> Trace:
    """Whole random traces, without alternatives."""
    return trace(
        draw(builders(balanced)),
        *draw(components()),
        offload_excluded=draw(st.sampled_from([(), ("vae",)])),
        basis=draw(st.sampled_from(["traced", "component"])),
        assumptions=tuple(draw(st.lists(st.text(max_size=5), max_size=2))),
    )
