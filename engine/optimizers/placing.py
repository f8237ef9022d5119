"""Which placement holds which component of a pipeline. No torch.

A list may have several placements: each holds the components it names, one that names none holds the rest, and where
none does, `resident` holds the rest. What one pipeline can have beside each other is what the libraries can do:
`resident` beside any one offload, and groups of several kinds. Source: diffusers 0.42. `enable_model_cpu_offload` and
`enable_sequential_cpu_offload` refuse a pipeline of which any component is in groups, and each begins by taking all of
accelerate's hooks away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from engine import optimizers
from engine.errors import IncompatibleError, UsageError
from engine.optimizers.spec import is_vae, named
from engine.values import FrozenDict, Step
from engine.words import did_you_mean, listing

RESIDENT = "resident"


def placements(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Return the steps that say where weights are, in their order."""
    return tuple(s for s in steps if optimizers.spec(s.name).is_placement)


def rest(steps: Iterable[Step]) -> Step | None:
    """Return the placement that holds every component that no other one names. None: `resident` does, by default."""
    return next((s for s in placements(steps) if named(s) is None), None)


def unknown(steps: Iterable[Step], components: Iterable[str]) -> tuple[str, ...]:
    """Return the names in steps that are none of a model's components with weights."""
    known = set(components)
    return tuple(dict.fromkeys(n for s in steps for n in named(s) or () if n not in known))


def refuse_unknown(steps: Iterable[Step], components: Iterable[str]) -> None:
    """Raises: UsageError, when a step names what the model does not have, with the nearest right word."""
    known = tuple(components)
    for name in unknown(steps, known):
        raise UsageError(
            f"the model has no component {name!r} with weights",
            f"it has {listing(known)}",
            did_you_mean(name, known),
        )


def holders(steps: Iterable[Step], components: Iterable[str]) -> dict[str, Step]:
    """Return the placement that holds each of these components, in their order. Names that are not there are passed by.

    Raises: UsageError, when two placements hold one component; IncompatibleError, when one pipeline cannot have all
        that hold something.
    """
    listed = placements(steps)
    by_name: dict[str, Step] = {}
    resting: Step | None = None
    for step in listed:
        names = named(step)
        if names is None:
            if resting is not None:
                raise UsageError(
                    f"{resting.name} and {step.name} both hold the rest of the model",
                    "neither says which components it holds, and each component has exactly one placement",
                    "name the components of one of them (components: […]), or leave it out",
                )
            resting = step
        for name in names or ():
            if name in by_name:
                raise UsageError(
                    f"{name!r} is held by {by_name[name].name} and by {step.name}",
                    "each component has exactly one placement",
                    "name it in one of them",
                )
            by_name[name] = step
    if resting is None:
        resting = optimizers.spec(RESIDENT).step()
    found = {name: by_name.get(name, resting) for name in components}
    _refuse_mixture(found)
    return found


def _refuse_mixture(found: dict[str, Step]) -> None:
    offloads = list(dict.fromkeys(s.name for s in found.values() if s.name != RESIDENT))
    if len(offloads) > 1:
        raise IncompatibleError(
            f"{listing(offloads)} cannot hold parts of one pipeline",
            "each of the libraries' offloads refuses the other's hooks, or takes them away",
            f"keep one of them, beside {RESIDENT}",
        )
    for name, step in found.items():
        is_block = step.params.get("type") == "block_level"
        if is_block and is_vae(name) and name in (named(step) or ()):
            raise IncompatibleError(
                f"group_offload cannot hold {name!r} at block level",
                "its `encode` and `decode` never run the hook of its outermost group",
                f"name it in {RESIDENT}, or in a group_offload of leaf_level",
            )


def spread(steps: Sequence[Step], components: Iterable[str]) -> tuple[Step, ...]:
    """Return steps in which every placement names what it holds of these components, as they are applied.

    One that holds everything names nothing. One that holds nothing is gone, and `resident` is there where it holds the
    rest. `resident` comes after the others: `enable_model_cpu_offload` and `enable_sequential_cpu_offload` bring to the
    host what is on the device, and then put what they leave out there themselves. Raises: as `holders`.
    """
    held = holders(steps, components)
    all_of = tuple(held)
    listed = list(placements(steps))
    if rest(listed) is None:
        listed.append(optimizers.spec(RESIDENT).step())
    own = [(step, tuple(n for n, s in held.items() if s == step)) for step in listed]
    explicit = [_naming(step, () if names == all_of else names) for step, names in own if names]
    explicit.sort(key=lambda s: s.name == RESIDENT)
    others = [s for s in steps if s not in listed]
    places = [i for i, s in enumerate(steps) if s in listed][: len(explicit)]
    found: list[Step] = others
    for place, step in zip(places, explicit, strict=False):
        found.insert(min(place, len(found)), step)
    return (*found, *explicit[len(places) :])


def _naming(step: Step, names: tuple[str, ...]) -> Step:
    """Return a placement that names these components; none of them: all."""
    params = {k: v for k, v in step.params.items() if k != "components"}
    return dataclasses.replace(step, params=FrozenDict(params | ({"components": names} if names else {})))
