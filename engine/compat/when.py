"""When a rule speaks: what is known of a machine, a model and a request, held against a rule's `when`.

A fact that is not known never holds, whichever way a rule asks for it. To add a condition: a function in `_CONDITIONS`,
and its form in `schema/compatibility.schema.json`. To add a trait: an entry in `TRAITS`; what it needs to know of a
model belongs into `engine/facts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engine import versions
from engine.facts import attention, tiling, widening
from engine.facts.model import Component, Model
from engine.values import FrozenDict

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")
"""The libraries whose versions a rule may be bound to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What rules may ask for beside the steps themselves. None is not known."""

    device: str | None = None
    """"cuda" or "cpu"."""
    compute_capability: tuple[int, int] | None = None
    platform: str | None = None
    """As `sys.platform` has it."""
    gpus: int | None = None
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    prompts_known: bool | None = None
    """Whether every prompt is there before anything is loaded."""
    model: Model | None = None
    libraries: Mapping[str, str | None] = field(default_factory=FrozenDict)
    """Versions, as `installed()` gives them."""


@cache
def installed() -> Mapping[str, str | None]:
    """Return the versions of the libraries that are installed here."""
    return FrozenDict({name: versions.installed(name) for name in LIBRARIES})


@dataclass(frozen=True, slots=True)
class Trait:
    """Something that follows from a model and a request, by more than a class or a configuration's entry."""

    about: str
    of: Callable[[Facts, str | None], bool | None]
    """Given the facts and the dtype that is computed in (None: not known)."""


def _widens_vae(facts: Facts, dtype: str | None) -> bool | None:
    precisions = None if facts.model is None else facts.model.widens_vae_in
    return None if precisions is None or dtype is None else dtype in precisions


def _tiles_to_another_size(facts: Facts, dtype: str | None) -> bool | None:
    vae = None if facts.model is None else facts.model.components.get("vae")
    return None if vae is None else tiling.are_of_another_size(vae.cls, vae.config)


TRAITS: dict[str, Trait] = {
    "tiling_starts": Trait(
        "the picture is larger than the VAE's tile, so that tiling starts",
        lambda f, _: None if f.model is None else f.model.tiling_starts(f.height, f.width),
    ),
    "can_fuse_qkv": Trait(
        "the denoiser's attention computes with fused projections",
        lambda f, _: None if f.model is None else f.model.can_fuse_qkv,
    ),
    "can_slice_attention": Trait(
        "the denoiser computes attention in slices when it is told to",
        lambda f, _: None if f.model is None else f.model.can_slice_attention,
    ),
    "convolves_in_2d": Trait(
        "what denoises, or the VAE, has two-dimensional convolutions",
        lambda f, _: None if f.model is None else f.model.convolves_in_2d,
    ),
    "has_vae": Trait(
        "the pipeline has a component that is called its VAE",
        lambda f, _: None if f.model is None else "vae" in f.model.components,
    ),
    "widens_vae": Trait("the pipeline widens its VAE to float32 while it runs", _widens_vae),
    "tiles_to_another_size": Trait("the VAE's tiles do not add up to the picture's size", _tiles_to_another_size),
    "prompts_known": Trait("every prompt is there before anything is loaded", lambda f, _: f.prompts_known),
}
"""The traits that a rule may ask for."""

ROLES: dict[str, Callable[[str], bool]] = {
    "vae": lambda name: name in widening.VAES,
    "denoiser": lambda name: name in attention.DENOISERS,
    "text_encoder": lambda name: name.startswith("text_encoder"),
    "any": lambda name: True,
}
"""What a component is in its pipeline, by its name."""


def components(wanted: Mapping[str, Any], model: Model | None) -> frozenset[str]:
    """Return the names of a model's components that a rule's `component` speaks of."""
    if model is None:
        return frozenset()
    is_one = ROLES[wanted["of"]]
    return frozenset(n for n, c in model.components.items() if is_one(n) and _is_meant(wanted, n, c, model))


def _is_meant(wanted: Mapping[str, Any], name: str, component: Component, model: Model) -> bool:
    if component.library not in ("diffusers", "transformers"):
        return False
    cls = model.class_of(component) if name in attention.DENOISERS else component.cls
    if "cls" in wanted and cls not in wanted["cls"]:
        return False
    if "other_than" in wanted and cls in wanted["other_than"]:
        return False
    asked = wanted.get("config", {})
    return all(key in component.config and component.config[key] in _listed(value) for key, value in asked.items())


def _listed(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _number(bounds: Mapping[str, int], value: int | None) -> bool:
    return value is not None and bounds.get("at_least", value) <= value < bounds.get("below", value + 1)


def _capability(bounds: Mapping[str, str], value: tuple[int, int] | None) -> bool:
    if value is None:
        return False
    low, high = (tuple(map(int, b.split("."))) if (b := bounds.get(k)) else None for k in ("at_least", "below"))
    return (low is None or low <= value) and (high is None or value < high)


def _libraries(wanted: Mapping[str, str], found: Mapping[str, str | None]) -> bool:
    return all((version := found.get(n)) is not None and versions.within(version, r) for n, r in wanted.items())


_CONDITIONS: dict[str, Callable[[Any, Facts, str | None], bool | None]] = {
    "device": lambda wanted, facts, _: facts.device == wanted,
    "compute_capability": lambda wanted, facts, _: _capability(wanted, facts.compute_capability),
    "platform": lambda wanted, facts, _: facts.platform in wanted,
    "gpus": lambda wanted, facts, _: _number(wanted, facts.gpus),
    "batch": lambda wanted, facts, _: _number(wanted, facts.batch),
    "dtype": lambda wanted, _, dtype: dtype in wanted,
    "libraries": lambda wanted, facts, _: _libraries(wanted, facts.libraries),
    "pipeline": lambda wanted, facts, _: facts.model is not None and facts.model.pipeline_class in wanted,
    "traits": lambda wanted, facts, dtype: all(TRAITS[t].of(facts, dtype) is v for t, v in wanted.items()),
    "component": lambda wanted, facts, _: bool(components(wanted, facts.model)),
}
CONDITIONS = tuple(_CONDITIONS)


_OF_DTYPE = ("dtype", "traits")
"""The conditions that may hold in one dtype and not in another."""


def may_hold(when: Mapping[str, Any], facts: Facts) -> bool:
    """Whether all that a rule asks for in `when` is known to hold, but for what the dtype decides (`holds_in`)."""
    return all(_CONDITIONS[n](wanted, facts, None) is True for n, wanted in when.items() if n not in _OF_DTYPE)


def holds_in(when: Mapping[str, Any], facts: Facts, dtype: str | None) -> bool:
    """Whether what `may_hold` leaves open is known to hold for a run that computes in `dtype`."""
    return all(_CONDITIONS[n](when[n], facts, dtype) is True for n in _OF_DTYPE if n in when)
