"""What a list of optimizers draws, beside what the plain pipeline draws, and whether it holds what was predicted.

Each optimizer alone, and each pair that the rules permit and of which both act, on every small architecture, on the
counted device with the libraries' own hooks. The pipeline is called twice: second calls are where hooks break.

The plain pipeline is the one with everything on the device. What is only near the plain picture (`Spec.quality`) is no
business of this comparison, but what stands beside it is: such a step is applied to the plain pipeline too, so that a
placement has to leave a cast or tiled picture exactly as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from engine import compat, optimizers
from engine.optimizers.spec import named
from engine.values import FrozenDict, Step
from truth import cases, pipelines, saved
from truth.cases import Case
from truth.executed import drawn
from truth.kept import kept
from truth.predicted import later_peak_bytes, predicted

CALLS = 2
QUICK_FIRST = (
    *("pixart", "ltx", "sdxl", "sd3", "qwen_image", "hunyuan_video", "lumina2", "sana", "flux"),
    *("cogvideox", "mochi", "wan", "sd_img2img", "sd"),
)
"""The architectures, by how long a call takes."""
LEFT_OUT = {
    "allocator": "it acts on CUDA's own allocator",
    "compile": "its compiler makes kernels for a card or a CPU, and none for the counted device",
    "tf32": "it acts on the products of a card alone",
    "xdit": "it needs several cards, and this version does not start it",
}
"""Optimizers that are not executed here, and why."""


def _step(name: str, **params: object) -> Step:
    return optimizers.spec(name).step(params)


_BFLOAT16 = _step("dtype", value="bfloat16")
_VARIANTS: dict[str, dict[str, tuple[Step, ...]]] = {
    "dtype": {"bfloat16": (_BFLOAT16,)},
    "layerwise_casting": {
        "fp8": (_step("layerwise_casting"),),
        "text and denoiser in fp8": cases.CASTS["text and denoiser in fp8"][:1],
    },
    "attention_backend": {"_native_math": (_step("attention_backend", backend="_native_math"),)},
    "group_offload": {n: (s,) for n, s in cases.PLACEMENTS.items() if s.name == "group_offload"},
}
"""The optimizers that act in several ways, by what tells them apart; all others are taken with their defaults."""


@cache
def ways() -> dict[str, tuple[Step, ...]]:
    """Return every way of every optimizer, by name. `vae_tiling` has a tile of the architecture's (`cases.TILES`)."""
    found: dict[str, tuple[Step, ...]] = {}
    for name in optimizers.NAMES:
        if name in LEFT_OUT:
            continue
        for told, steps in _VARIANTS.get(name, {"": (_step(name),)}).items():
            found[f"{name}, {told}" if told else name] = steps
    return found


def case_of(architecture: str, *names: str) -> Case:
    """Return an architecture with some ways at once, called so that each has something to act on."""
    steps = tuple({str(s): s for n in names for s in ways()[n]}.values())
    call: dict[str, object] = {}
    own = saved.model(architecture).parts
    steps = tuple(_naming(s, [n for n in named(s) or () if n in own]) for s in steps)
    tile, sizes = cases.TILES.get(architecture, (32, {}))
    if any(s.name == "vae_tiling" for s in steps):
        steps = tuple(_step("vae_tiling", tile=tile) if s.name == "vae_tiling" else s for s in steps)
        call |= sizes
    if any(s.name == "vae_slicing" for s in steps):
        call |= cases.several(architecture, 2)
    dtype = next((str(s.params["value"]) for s in steps if s.name == "dtype"), "float32")
    return Case(architecture=architecture, steps=optimizers.in_order(steps), dtype=dtype, call=FrozenDict(call))


def _naming(step: Step, names: Sequence[str]) -> Step:
    """Return a step with these names of components, if it has any: cases name those of every architecture."""
    return dataclasses.replace(step, params=FrozenDict({**step.params, "components": tuple(names)})) if names else step


def singles(architecture: str) -> Iterator[Case]:
    """Yield an architecture under each way that acts on it."""
    for name in ways():
        case = case_of(architecture, name)
        if is_permitted(case):
            yield case


def pairs(architecture: str) -> Iterator[Case]:
    """Yield an architecture under each permitted pair of ways of which both act, and with its parts placed apart."""
    for one, other in itertools.combinations(ways(), 2):
        if {s.name for s in ways()[one]} & {s.name for s in ways()[other]}:
            continue
        case = case_of(architecture, one, other)
        if is_permitted(case):
            yield case
    yield from cases.every_mixture([architecture])


def few() -> list[Case]:
    """Return a part of all: each way and each architecture at least once, the same every time.

    Ways go round the architectures, each on the next one on which it acts. One denoising step does: calls are two.
    """
    waiting, found = list(QUICK_FIRST), []
    for name in ways():
        for architecture in tuple(waiting):
            case = case_of(architecture, name)
            if is_permitted(case):
                found.append(case)
                waiting.remove(architecture)
                waiting.append(architecture)
                break
    seen = {c.architecture for c in found}
    found += [case_of(n, "group_offload, leaf, streamed") for n in pipelines.ALL if n not in seen]
    return [
        dataclasses.replace(c, call=FrozenDict({**c.call, "num_inference_steps": fewest_steps(c.architecture)}))
        for c in found
    ]


def fewest_steps(architecture: str) -> int:
    """Return how few denoising steps a call can have.

    Where a picture goes in, a part of them is left out; and the schedule of Mochi is made of two stretches.
    """
    return 2 if architecture == "mochi" or "strength" in cases.usual_call(architecture) else 1


def is_permitted(case: Case) -> bool:
    """Whether no rule is broken, and none says that a step has no effect."""
    return not any(f.breaks or f.is_idle for f in findings(case))


def findings(case: Case) -> tuple[compat.Finding, ...]:
    """Return what the rules say of a case on a card, of which is known what planning knows."""
    usual = dict(cases.usual_call(case.architecture)) | dict(case.call)
    facts = compat.Facts(
        device="cuda",
        batch=cases.drawn_at_once(usual),
        height=usual.get("height"),
        width=usual.get("width"),
        prompts_known=True,
        model=saved.model(case.architecture),
        libraries=compat.installed(),
    )
    dtype = () if any(s.name == "dtype" for s in case.steps) else (_step("dtype", value=case.dtype),)
    return compat.under(facts).findings((*dtype, *case.steps))


def plain(case: Case) -> Case:
    """Return what a case is held against: everything on the device, and of its steps those that are not exact."""
    near = tuple(s for s in case.steps if optimizers.spec(s.name).quality != "exact")
    return Case(architecture=case.architecture, steps=near, dtype=case.dtype, call=case.call)


SUMS = {
    "attention_backend": "another kernel takes its sums in another order",
    "channels_last": "a convolution in another layout is another kernel, with sums in another order",
    "fuse_qkv": "three products become one, whose sums the CPU's library may take in another order",
    "vae_slicing": "convolutions of one picture and of a batch take their sums in another order",
}
"""The exact optimizers that are not equal to the bit, and why: what they compute is the same, and not the order."""
OFF = 2.0**-16
"""How far a picture (numbers from 0 to 1) may then be from the plain one, in float32.

A sum of some hundreds of products, taken in another order, is off by some ten roundings (2**-24) of its size; the sums
of some ten layers follow each other, and guidance multiplies what is off by as much as it is strong.
"""


def allowed(case: Case) -> float:
    """Return how far what a case draws may be from the plain picture: nothing, unless a reason is known (`SUMS`).

    In fewer bits than float32 a layer's roundings fall otherwise. How far they carry depends on the model, and is seen
    in the plain picture itself: two pictures that are as near to that of float32 as it is are twice that apart at most.
    """
    if not any(s.name in SUMS for s in case.steps):
        return 0.0
    if case.dtype == "float32":
        return OFF
    narrow = plain(case)
    wide = dataclasses.replace(narrow, dtype="float32", steps=tuple(s for s in narrow.steps if s.name != "dtype"))
    return 2 * _off(_plainly(narrow), _plainly(wide))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A case, what it drew and what it held; `off` is by how much each call differs from the plain picture at most."""

    id: str
    architecture: str
    optimizers: tuple[str, ...]
    off: tuple[float, ...]
    allowed: float
    error: float
    """Of the predicted peak, as a share of what was held."""
    later_error: float
    """By how much the peak of later calls is beyond the predicted one, as a share; negative where it is below."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """Return what is not as it should be, in words."""
        found = [f"call {i} is off by {o:.2g}" for i, o in enumerate(self.off, 1) if not o <= self.allowed]
        if self.error:
            found.append(f"the peak was predicted {self.error:+.3%} off")
        if self.later_error > 0:
            found.append(f"later calls held {self.later_error:.3%} more than was predicted")
        return tuple(found)


def compared(case: Case) -> Drawn:
    """Execute a case twice in a row, held against the plain pipeline and what is predicted. Raises: as `drawn`."""
    wanted = _plainly(plain(case))
    seen, calls = drawn(case, CALLS)
    told = predicted(case)
    return Drawn(
        id=case.id,
        architecture=case.architecture,
        optimizers=tuple(s.name for s in case.steps),
        off=tuple(_off(call.picture, wanted) for call in calls),
        allowed=allowed(case),
        error=told.peak_bytes / seen.peak_bytes - 1,
        later_error=max(c.peak_bytes for c in calls[1:]) / later_peak_bytes(case) - 1,
    )


_plain: dict[str, np.ndarray] = {}


def _plainly(case: Case) -> np.ndarray:
    return kept(_plain, case.id, lambda: drawn(case, 1)[1][0].picture)


def _off(one: np.ndarray, other: np.ndarray) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other).max())
