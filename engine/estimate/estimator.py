"""Estimates for one request on one card: a dry run's trace when it is needed, and answers that were given before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine import history, optimizers
from engine.calibration import Calibration
from engine.estimate import store
from engine.estimate.between import between, within
from engine.estimate.ways import QUADRATIC, way
from engine.facts.model import Model
from engine.optimizers import attention_backend, placing
from engine.values import Estimate, Gpu, Request, Step

if TYPE_CHECKING:
    from engine.estimate.bounds import Bounds, Least
    from engine.estimate.clock import Speeds
    from engine.estimate.timeline import Timeline
    from engine.estimate.trace import Trace

UNKNOWN = Estimate()
_REQUESTS_KEPT = 32
_LEASTS: dict[tuple[str, str], dict[str, Least]] = {}


class Estimator:
    """Gives the estimate of a list of optimizers; `because` says why there is none, once one was asked for in vain."""

    def __init__(
        self,
        model: Model,
        request: Request,
        gpu: Gpu | None,
        budget_bytes: int | None,
        told: Callable[[str], None] | None = None,
        *,
        calibration: Calibration | None = None,
        runs: Sequence[history.Run] = (),
        may_run: bool = True,
    ) -> None:
        """`calibration` is what was measured of the card, `runs` are those it made under the same circumstances.

        Without `may_run`, what needs a dry run that was not made yet raises `store.NotTraced`.
        """
        self.model = model
        self.request = request
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.because: str | None = None
        self.calibration = calibration
        self._measured_by = None if calibration is None else calibration.digest
        self._ranges = history.ranges(runs)
        self._told = told
        self._may_run = may_run
        self._keys: dict[tuple[str, ...], str] = {}
        self._answers: dict[str, store.Answers] = {}
        # What a LoRA is fused into is no page of its file any more.
        changed = {n for lora in request.loras for n in lora.components}
        self._stored = {n: None if n in changed else c.stored_dtype for n, c in model.components.items()}
        self._card = None if gpu is None else store.card_key(gpu, request, self._stored, self._measured_by)
        self._speed: dict[bool, Speeds | None] = {}
        self._ways: dict[tuple[str, str], Trace] = {}
        self._beside: dict[tuple[str, ...], tuple[Estimator, Estimator, float] | None] = {}
        self._found: dict[str, Estimate] = {}
        self._bounded: dict[tuple[Any, ...], tuple[Bounds, dict[str, float] | None] | None] = {}

    def __call__(self, steps: Sequence[Step]) -> Estimate:
        """Return what a run under these steps takes; every field None where it is not known.

        Steps that do nothing here are not among them. Raises: ModelError, UsageError, IncompatibleError: what the dry
        run has against the model, its call, or a step.
        """
        if self.model.components:
            placing.refuse_unknown(steps, self.model.parts)
        dtype = _dtype(steps)
        self.because = self._unknown(steps, dtype)
        if self.because is not None or self.gpu is None:
            return UNKNOWN
        asked = "; ".join(map(str, steps))
        if asked in self._found:
            return self._found[asked]
        answers = self._answers_of(self._key(dtype, _changes(steps)))
        name = f"{self._card} {asked}"
        found = answers.get(name)
        if found is None:
            trace = self._trace(dtype, _changes(steps), way(steps))
            if trace is None:
                neighbours = self._between(steps)
                if neighbours is None:
                    return UNKNOWN
                self._found[asked] = self._told_by_runs(steps, neighbours)
                return self._found[asked]
            from engine.estimate.whole import estimate

            found = estimate(
                trace,
                steps,
                self.gpu,
                dtype=dtype,
                denoising_steps=self.request.steps,
                stored=self._stored,
                absent=self.request.components,
                calibration=self.calibration,
            )
            answers.put(name, found)
        self._found[asked] = self._told_by_runs(steps, found)
        return self._found[asked]

    def least(self, steps: Sequence[Step]) -> Least | None:
        """Return the least that a run under these steps takes, without a replay; None where it is not known.

        It may make the dry run of the plain pipeline, and never one for tiles of another size. Raises: as an estimate.
        """
        asked = "; ".join(map(str, steps))
        if asked not in self._leasts:
            found = self._least(steps)
            if found is None:
                return None
            self._leasts[asked] = found
        return self._leasts[asked]

    def _least(self, steps: Sequence[Step]) -> Least | None:
        if self._unknown(steps, dtype := _dtype(steps)) is not None or self.gpu is None or self._context is None:
            return None
        changes = _changes(steps)
        # Tiles of another size are bounded by the plain decode, whether their own trace is there by now or not: what a
        # plan says must not depend on what was asked before.
        others = tuple(s for s in changes if s.name != "vae_tiling")
        is_own = others == changes
        found = self._bounds(dtype, others, way(steps) if is_own else "", _is_tf32(steps))
        if found is None:
            return None
        bounds, seconds = found
        computing = None
        if seconds is not None:
            saved = 0.0 if is_own else seconds[QUADRATIC]
            computing = max(0.0, sum(s for n, s in seconds.items() if n != QUADRATIC) - saved)
        return bounds.least(
            steps,
            context_bytes=self._context,
            computing_s=computing,
            speed=self._speeds(_is_tf32(steps)),
            denoising_steps=self.request.steps,
            is_own=is_own,
        )

    def timed(self, steps: Sequence[Step]) -> float | None:
        """Return the seconds that the estimate will give, without the rest of it; None where no trace is there yet.

        In tiles of another size they are the least: those of the plain decode, less what tiles could save of it.
        """
        if any(s.name == "vae_tiling" for s in _changes(steps)):
            plain = [s for s in steps if s.name != "vae_tiling"]
            found = self.timed(plain)
            bounds = self._bounds(_dtype(plain), _changes(plain), "", _is_tf32(plain))
            saved = 0.0 if bounds is None or bounds[1] is None else bounds[1][QUADRATIC]
            return None if found is None else max(0.0, found - saved)
        dtype, changes = _dtype(steps), _changes(steps)
        if self._unknown(steps, dtype) is not None or self.gpu is None:
            return None
        asked = "; ".join(map(str, steps))
        if asked in self._found:
            return self._found[asked].seconds
        key = self._key(dtype, changes)
        answers = self._answers_of(key)
        name = f"{self._card} seconds {asked}"
        if (known := answers.get(f"{self._card} {asked}")) is not None:
            return known.seconds
        if answers.note(name) is None:
            trace = store.known(key)
            if trace is None:
                return None
            from engine.estimate import whole

            along = self._along(key, trace, way(steps))
            speed = self._speeds(_is_tf32(steps))
            found = whole.seconds_of(along, steps, speed, dtype=dtype, denoising_steps=self.request.steps)
            answers.keep(name, found)
        seconds = answers.note(name)
        return float(seconds) if isinstance(seconds, int | float) else None

    def _along(self, key: str, trace: Trace, name: str) -> Trace:
        """Return one way through a trace without what is absent, made once."""
        if (key, name) not in self._ways:
            self._ways[key, name] = trace.along(name).without(self.request.components)
        return self._ways[key, name]

    def sizes(self, dtype: str) -> Mapping[str, int]:
        """Return the bytes of each component's weights in a dtype; empty without a trace. Raises: as `least`."""
        if self._unknown((), dtype) is not None:
            return {}
        found = self._bounds(dtype, (), "")
        return {} if found is None else {n: p.weights_bytes for n, p in found[0].parts.items()}

    @functools.cached_property
    def _leasts(self) -> dict[str, Least]:
        """Bounds by steps, shared by all that ask for one request on one card: a hundred of them, a request."""
        asked = store.key(self.model, self.request, ""), self._card or ""
        for oldest in list(_LEASTS)[:-_REQUESTS_KEPT]:
            _LEASTS.pop(oldest, None)
        return _LEASTS.setdefault(asked, {})

    @functools.cached_property
    def _context(self) -> int | None:
        """What CUDA takes of the card before anything is computed."""
        from engine.estimate import workspaces

        capability = None if self.gpu is None else self.gpu.compute_capability
        return None if capability is None else workspaces.context_bytes(capability, self.calibration)

    def _speeds(self, is_tf32: bool) -> Speeds | None:
        if is_tf32 not in self._speed and self.gpu is not None:
            from engine.estimate import clock

            self._speed[is_tf32] = clock.speeds(self.gpu, "value", self.calibration, tf32=is_tf32)
        return self._speed.get(is_tf32)

    def _bounds(
        self, dtype: str, changes: tuple[Step, ...], along: str, is_tf32: bool = False
    ) -> tuple[Bounds, dict[str, float] | None] | None:
        """Return the bounds of one way through a trace, and the seconds by phase with everything on the device."""
        asked = is_tf32, dtype, along, *map(str, changes)
        if asked in self._bounded:
            return self._bounded[asked]
        from engine.estimate.bounds import Bounds, of_trace

        key = self._key(dtype, changes)
        answers = self._answers_of(key)
        bounds_name = f"bounds {along} {sorted(self.request.components)}"
        seconds_name = f"{self._card} computing {along}{' in tf32' if is_tf32 else ''}"
        kept, seconds = answers.note(bounds_name), answers.note(seconds_name)
        bounds = None
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            bounds = None if kept is None else Bounds.from_json(kept)
        if bounds is None or not isinstance(seconds, dict) or QUADRATIC not in seconds:
            trace = self._trace(dtype, changes, along)
            if trace is None:
                return None
            from engine.estimate import whole

            trace = trace.along(along).without(self.request.components)
            bounds = of_trace(trace)
            seconds = whole.computing_seconds(trace, self._speeds(is_tf32), self.request.steps)
            answers.keep(bounds_name, bounds.to_json())
            answers.keep(seconds_name, seconds)
        self._bounded[asked] = bounds, seconds
        return self._bounded[asked]

    def _answers_of(self, key: str) -> store.Answers:
        if key not in self._answers:
            self._answers[key] = store.Answers(key)
        return self._answers[key]

    def _told_by_runs(self, steps: Sequence[Step], found: Estimate) -> Estimate:
        """Return an estimate within the budget, its interval as the remembered runs have it: these are not kept."""
        return history.adjusted(within(found, self.budget_bytes), self._range(steps, found))

    def _range(self, steps: Sequence[Step], found: Estimate) -> history.Range | None:
        return self._ranges.get((history.placement(steps), found.basis))

    def remembered(self, steps: Sequence[Step], found: Estimate) -> int | None:
        """Return how many kinds of runs an estimate's interval is of; None where it is not of runs."""
        known = self._range(steps, found)
        return None if known is None or (known.bytes is None and known.seconds is None) else known.kinds

    def timeline(self, steps: Sequence[Step]) -> Timeline | None:
        """Return what is on the card along a run under these steps; None where it is not known, as `because` says.

        Answers are kept and timelines are not: this needs the trace. Raises: ModelError, UsageError.
        """
        dtype = _dtype(steps)
        self.because = self._unknown(steps, dtype)
        if self.because is not None or self.gpu is None:
            return None
        trace = self._trace(dtype, _changes(steps), way(steps))
        if trace is None:
            return None
        from engine.estimate import timeline

        return timeline.of_trace(trace, steps, self.gpu, dtype, self.request.components, self.calibration)

    def _unknown(self, steps: Sequence[Step], dtype: str) -> str | None:
        """Return why there can be no estimate, or None."""
        if self.gpu is None:
            return "estimates are of a card's memory, and this runs without one"
        if self.gpu.compute_capability is None:
            return "the card's compute capability is not known: name a card of the table (--gpu)"
        if dtype == "auto":
            return "the dtype is open until the card is known"
        if self.model.source == "pipeline":
            return "a pipeline object is taken as it is; plan by its model's name or directory"
        if any(s.name == "xdit" for s in steps):
            return "xdit runs on several cards, and estimates are of one"
        for step in steps:
            because = optimizers.optional(step.name, "not_estimated")
            if because is not None and (why := because(step)) is not None:
                return str(why)
        return self._unknown_attention(steps)

    def _unknown_attention(self, steps: Sequence[Step]) -> str | None:
        """Return whose kernel of attention was never looked into on this card, or None."""
        from engine.estimate import workspaces

        named = {s.params["backend"] for s in steps if s.name == "attention_backend"}
        if others := sorted(named & set(attention_backend.PACKAGES)):
            return f"what the kernels of {', '.join(others)} hold is not known"
        capability = None if self.gpu is None else self.gpu.compute_capability
        if "_native_cudnn" in named and (capability is None or not workspaces.cudnn_attends(capability)):
            return "what cuDNN's attention holds is known of compute capability 9.0 and 10.0 only"
        return None

    def _key(self, dtype: str, changes: tuple[Step, ...]) -> str:
        asked = dtype, *map(str, changes)
        if asked not in self._keys:
            self._keys[asked] = store.key(self.model, self.request, dtype, changes)
        return self._keys[asked]

    def _trace(self, dtype: str, changes: tuple[Step, ...], along: str) -> Trace | None:
        is_plain = self.request.exact and not along
        found = store.find(
            self.model, self.request, dtype, changes, self._told, is_plain=is_plain, may_run=self._may_run
        )
        if found is None:
            self.because = "torch, diffusers and transformers are needed for a dry run, and not all are installed"
        return found

    def _between(self, steps: Sequence[Step]) -> Estimate | None:
        """Return what lies between the nearest sizes whose traces are there; None where one side has none."""
        neighbours = self._neighbours(_dtype(steps), _changes(steps))
        if neighbours is None:
            return None
        low, high = (estimator(steps) for estimator in neighbours[:2])
        self.because = None
        return between(low, high, neighbours[2])

    def _neighbours(self, dtype: str, changes: tuple[Step, ...]) -> tuple[Estimator, Estimator, float] | None:
        """Return what estimates the nearest smaller and larger picture, and where between them this one lies."""
        asked_for = dtype, *map(str, changes)
        if asked_for not in self._beside:
            self._beside[asked_for] = self._looked_for(dtype, changes)
        return self._beside[asked_for]

    def _looked_for(self, dtype: str, changes: tuple[Step, ...]) -> tuple[Estimator, Estimator, float] | None:
        usual, pixels = self.model.defaults, self.request.pixels
        if pixels is None:
            return None
        sizes = {(side, side) for side in store.SHIPPED_SIDES_PX}
        if usual.height is not None and usual.width is not None:
            sizes.add((usual.height, usual.width))
        below: tuple[int, Request] | None = None
        above: tuple[int, Request] | None = None
        for height, width in sorted(sizes, key=lambda size: size[0] * size[1]):
            asked = dataclasses.replace(self.request, height=height, width=width)
            if store.known(store.key(self.model, asked, dtype, changes)) is None:
                continue
            if height * width <= pixels:
                below = height * width, asked
            elif above is None:
                above = height * width, asked
        if below is None or above is None:
            return None
        low, high = (
            Estimator(self.model, asked, self.gpu, None, calibration=self.calibration) for _, asked in (below, above)
        )
        return low, high, (pixels - below[0]) / (above[0] - below[0])

    def save(self) -> None:
        """Keep the answers that are new."""
        for answers in self._answers.values():
            answers.save()


def _dtype(steps: Sequence[Step]) -> str:
    """Return the dtype that steps load in: float32, as the libraries do, where none says."""
    return next((str(s.params["value"]) for s in steps if s.name == "dtype"), "float32")


def _is_tf32(steps: Sequence[Step]) -> bool:
    return any(s.name == "tf32" for s in steps)


def _changes(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that change what is computed, and so what is traced."""
    return optimizers.changing(steps)
