"""What each optimizer does to each small architecture, really, beside what the rules say of it before.

Each is applied by itself, the way `plan.apply` does it, to a pipeline on the counted device, which is then called once.
It has an effect where anything is unlike the plain pipeline: how a weight lies in memory, what is allocated and freed
on the device, what is pinned, or the picture.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine import collector, optimizers
from engine.errors import DgRunError
from engine.facts import tiling
from engine.optimizers import staged_encoding
from engine.optimizers.spec import Context, modules
from engine.run import load, staged, stages
from engine.run.progress import Quiet
from engine.values import FrozenDict
from truth import cases, device, executed, outputs, pipelines, saved
from truth.cases import Case

APPLIED, NOTHING, REFUSED = "applied", "no effect", "refused"
FAILED = "fails"
"""Nobody has refused it, and the libraries raise while it runs, or the picture has another size."""
_LEFT_OUT = ("sd_img2img", "lumina2")
# The first is made of the components of sd; the pictures of the second, whose VAE is smaller than its pipeline takes it
# for, have not the size that is asked for, and rules go by that.
ARCHITECTURES = tuple(n for n in pipelines.ALL if n not in _LEFT_OUT)
SITUATIONS: dict[str, tuple[str, ...]] = {
    "layerwise_casting": ("bfloat16 to bfloat16",),
    "vae_slicing": ("one picture",),
    "vae_tiling": ("the library's own tile", "a picture of one tile", "a tile as large as the picture"),
}
"""What an optimizer meets in which it may do nothing, beside the call that gives it something to act on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way of an optimizer on one architecture; `told` and `seen` are what the rules and the run make of it."""

    way: str
    architecture: str
    told: str
    rules: tuple[str, ...] = ()
    """Those that say so."""
    seen: str
    because: str = ""
    """Why it was refused or failed, in the words of the error."""

    @property
    def agrees(self) -> bool:
        """Whether what was said before the run is what came.

        A step of which a rule says that it does nothing is passed over where it cannot act: both are "no effect". What
        a rule refuses may fail, or be too small a picture to show why.
        """
        if self.told == NOTHING:
            return self.seen in (NOTHING, REFUSED)
        return self.seen != APPLIED if self.told == REFUSED else self.seen == self.told


def ways() -> tuple[str, ...]:
    """Return the names of what is tried: every way of every optimizer, and the situations."""
    found = [(optimizers.NAMES.index(steps[-1].name), way) for way, steps in outputs.ways().items()]
    found += [
        (optimizers.NAMES.index(n), f"{n}, {told}") for n, situations in SITUATIONS.items() for told in situations
    ]
    return tuple(way for _, way in sorted(found, key=lambda f: f[0]))


def case_of(architecture: str, name: str) -> Case:
    """Return an architecture with one way of an optimizer, called for one step as that way wants it.

    A cast is "layerwise_casting, DTYPE to DTYPE".
    """
    case = _case_of(architecture, name)
    return dataclasses.replace(
        case, call=FrozenDict(dict(case.call) | {"num_inference_steps": outputs.fewest_steps(architecture)})
    )


def _case_of(architecture: str, name: str) -> Case:
    way, _, situation = name.partition(", ")
    if way == "layerwise_casting" and " to " in situation:
        dtype, _, storage = situation.partition(" to ")
        steps = optimizers.spec("dtype").step({"value": dtype}), optimizers.spec(way).step({"storage": storage})
        return Case(architecture=architecture, steps=steps, dtype=dtype)
    if situation not in SITUATIONS.get(way, ()):
        return outputs.case_of(architecture, name)
    case = outputs.case_of(architecture, way)
    if situation == "one picture":
        return dataclasses.replace(case, call=FrozenDict())
    usual, vae = cases.usual_call(architecture), saved.model(architecture).components["vae"]
    own, step = tiling.own(vae.cls, vae.config), tiling.multiple(vae.cls, vae.config)
    assert own is not None and step is not None
    few = {"num_frames": min(usual["num_frames"], 5)} if "num_frames" in usual else {}
    match situation:
        case "a tile as large as the picture":
            return _tiled(case, -(-max(usual["height"], usual["width"]) // step) * step, {})
        case "a picture of one tile":
            return _tiled(case, None, {"height": own[0], "width": own[1], **few})
    return _tiled(case, None, {"height": own[0] + _MORE_PX, "width": own[1] + _MORE_PX, **few})


_MORE_PX = 32
"""Sides that every pipeline takes are multiples of it."""


def _tiled(case: Case, tile: int | None, call: Mapping[str, int]) -> Case:
    return dataclasses.replace(case, steps=(optimizers.spec("vae_tiling").step({"tile": tile}),), call=FrozenDict(call))


def cell(architecture: str, way: str) -> Cell:
    """Return what comes of one way of an optimizer on one architecture."""
    case = case_of(architecture, way)
    told, rules = _told(case)
    seen, because = _seen(case)
    return Cell(way=way, architecture=architecture, told=told, rules=rules, seen=seen, because=because)


def _told(case: Case) -> tuple[str, tuple[str, ...]]:
    """Return what the rules say of a case's last step, and which do."""
    own = [f for f in outputs.findings(case) if not f.subjects or _meant(case) in f.subjects]
    for outcome, found in ((REFUSED, [f for f in own if f.breaks]), (NOTHING, [f for f in own if f.is_idle])):
        if found:
            return outcome, tuple(f.rule.id for f in found)
    return APPLIED, ()


def _meant(case: Case) -> str:
    return case.steps[-1].name


def _seen(case: Case) -> tuple[str, str]:
    """Return what comes of a case, and the words of its error if there is one."""
    # Everything on the device is the plain pipeline itself: it is held against the one that is left on the host.
    steps = list(case.steps[:-1])
    if _meant(case) != "resident":
        steps.append(optimizers.spec("resident").step())
    plain = _plain(dataclasses.replace(case, steps=tuple(steps), dtype=_plain_dtype(case)))
    try:
        found = _run(case)
    except DgRunError as error:
        return REFUSED, " ".join(f"{error.what}: {error.why}".split())
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is what is to be known
        return FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if found.picture.shape != plain.picture.shape:
        return FAILED, f"the picture is {found.picture.shape}, and {plain.picture.shape} without it"
    return (NOTHING if found == plain else APPLIED), ""


def _plain_dtype(case: Case) -> str:
    return "float32" if _meant(case) == "dtype" else case.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """What one run leaves: weights as they lie once all is applied, bytes that come and go, and the picture."""

    weights: tuple[object, ...]
    moves: tuple[int, ...]
    pinned_bytes: int
    picture: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trail) and (
            (self.weights, self.moves, self.pinned_bytes) == (other.weights, other.moves, other.pinned_bytes)
            and np.array_equal(self.picture, other.picture, equal_nan=True)
        )


_trails: dict[str, Trail] = {}


def _plain(case: Case) -> Trail:
    if case.id not in _trails:
        _trails[case.id] = _run(case)
    return _trails[case.id]


def _run(case: Case) -> Trail:
    """Make a run of a case: load in stages where it is one, else apply, as `plan.apply` does; then call."""
    device.load()
    gc.collect()
    here = Context(device=device.NAME if case.steps else "cpu", dtype=case.dtype)
    pipe, call = case.made(small_tiles=False)
    device.reset_peak()
    with torch.no_grad(), collector.off(), device.recording() as moves:
        if staged_encoding.is_in(case.steps):
            whole = saved.parts_of_case(case, pipe)
            found = staged.first(whole, case.steps, lambda _: [call], here, Quiet())
            pipe = staged.second(whole, case.steps, found, here, Quiet())
            weights = _weights(pipe)
            with stages.given(pipe, found.encoded[0], here.device):
                picture = executed.drawing(pipe, call)
        else:
            load.apply_all(case.steps, pipe, here, Quiet())
            weights = _weights(pipe)
            picture = executed.drawing(pipe, call)
        pinned_bytes = device.counts().pinned_peak_bytes
    sizes = tuple(size if number > 0 else -size for number, size in moves)
    return Trail(weights, sizes, pinned_bytes, picture)


def _weights(pipe: Any) -> tuple[object, ...]:
    return tuple(
        (name, path, str(weight.dtype), weight.stride(), weight.device.type)
        for name, module in modules(pipe).items()
        for path, weight in module.named_parameters()
    )
