"""Estimates for one request on one card: a dry run's trace when it is needed, and answers that were given before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine import history, optimizers
from engine.calibration import Calibration
from engine.estimate import store
from engine.estimate.between import between, within
from engine.estimate.ways import way
from engine.facts.model import Model
from engine.optimizers import placing
from engine.values import Estimate, Gpu, Request, Step

if TYPE_CHECKING:
    from engine.estimate.timeline import Timeline
    from engine.estimate.trace import Trace

UNKNOWN = Estimate()


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
    ) -> None:
        """`calibration` is what was measured of the card, `runs` are those it made under the same circumstances."""
        self.model = model
        self.request = request
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.because: str | None = None
        self.calibration = calibration
        self._measured_by = None if calibration is None else calibration.digest
        self._ranges = history.ranges(runs)
        self._told = told
        self._keys: dict[tuple[str, ...], str] = {}
        self._answers: dict[str, store.Answers] = {}

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
        wanted = self._key(steps)
        answers = self._answers.setdefault(wanted, store.Answers(wanted))
        stored = {n: c.stored_dtype for n, c in self.model.components.items()}
        name = store.case(steps, self.gpu, self.request, stored, self._measured_by)
        found = answers.get(name)
        if found is None:
            trace = self._trace(steps)
            if trace is None:
                neighbours = self._between(steps)
                return UNKNOWN if neighbours is None else self._told_by_runs(steps, neighbours)
            from engine.estimate.whole import estimate

            found = estimate(
                trace,
                steps,
                self.gpu,
                dtype=dtype,
                denoising_steps=self.request.steps,
                stored=stored,
                absent=self.request.components,
                calibration=self.calibration,
            )
            answers.put(name, found)
        return self._told_by_runs(steps, found)

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
        trace = self._trace(steps)
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
        return None

    def _key(self, steps: Sequence[Step]) -> str:
        dtype, changes = _dtype(steps), _changes(steps)
        asked = dtype, *map(str, changes)
        if asked not in self._keys:
            self._keys[asked] = store.key(self.model, self.request, dtype, changes)
        return self._keys[asked]

    def _trace(self, steps: Sequence[Step]) -> Trace | None:
        is_plain = self.request.exact and not way(steps)
        found = store.find(self.model, self.request, _dtype(steps), _changes(steps), self._told, is_plain=is_plain)
        if found is None:
            self.because = "torch, diffusers and transformers are needed for a dry run, and not all are installed"
        return found

    def _between(self, steps: Sequence[Step]) -> Estimate | None:
        """Return what lies between the nearest sizes whose traces are there; None where one side has none."""
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
            if store.known(store.key(self.model, asked, _dtype(steps), _changes(steps))) is None:
                continue
            if height * width <= pixels:
                below = height * width, asked
            elif above is None:
                above = height * width, asked
        if below is None or above is None:
            return None
        low, high = (
            Estimator(self.model, asked, self.gpu, None, calibration=self.calibration)(steps)
            for _, asked in (below, above)
        )
        self.because = None
        return between(low, high, (pixels - below[0]) / (above[0] - below[0]))

    def save(self) -> None:
        """Keep the answers that are new."""
        for answers in self._answers.values():
            answers.save()


def _dtype(steps: Sequence[Step]) -> str:
    """Return the dtype that steps load in: float32, as the libraries do, where none says."""
    return next((str(s.params["value"]) for s in steps if s.name == "dtype"), "float32")


def _changes(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps that change what is computed, and so what is traced."""
    return optimizers.changing(steps)
