"""Estimates for one request on one card: a dry run's trace when it is needed, and answers that were given before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine import optimizers
from engine.estimate import store
from engine.estimate.trace import Trace
from engine.estimate.whole import estimate, within
from engine.facts.model import Model
from engine.values import Estimate, Gpu, Request, Step

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
    ) -> None:
        self.model = model
        self.request = request
        self.gpu = gpu
        self.budget_bytes = budget_bytes
        self.because: str | None = None
        self.trace: Trace | None = None
        self._told = told
        self._keys: dict[tuple[str, tuple[str, ...]], str] = {}
        self._answers: dict[str, store.Answers] = {}

    def __call__(self, steps: Sequence[Step]) -> Estimate:
        """Return what a run under these steps takes; every field None where it is not known.

        Steps that do nothing here are not among them. Raises: ModelError, UsageError, IncompatibleError: what the dry
        run has against the model, its call, or a step.
        """
        dtype = next((str(s.params["value"]) for s in steps if s.name == "dtype"), "float32")
        self.because = self._unknown(steps, dtype)
        if self.because is not None or self.gpu is None:
            return UNKNOWN
        changes = tuple(s for s in steps if optimizers.spec(s.name).changes_computing)
        asked = dtype, tuple(map(str, changes))
        wanted = self._keys.get(asked) or self._keys.setdefault(
            asked, store.key(self.model, self.request, dtype, changes)
        )
        answers = self._answers.setdefault(wanted, store.Answers(wanted))
        stored = {n: c.stored_dtype for n, c in self.model.components.items()}
        name = store.case(steps, self.gpu, self.request, stored)
        found = answers.get(name)
        if found is None:
            trace = self._trace(wanted, dtype, changes)
            if trace is None:
                return UNKNOWN
            found = estimate(
                trace,
                steps,
                self.gpu,
                dtype=dtype,
                denoising_steps=self.request.steps,
                stored=stored,
                absent=self.request.components,
            )
            answers.put(name, found)
        return within(found, self.budget_bytes)

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

    def _trace(self, wanted: str, dtype: str, changes: Sequence[Step]) -> Trace | None:
        found = store.known(wanted)
        if found is None and store.can_trace() and self._told is not None:
            self._told(f"dry run of {self.request.model} (once for each size; some seconds, no weights)")
        found = found or store.find(self.model, self.request, dtype, changes)
        if found is None:
            self.because = "torch, diffusers and transformers are needed for a dry run, and not all are installed"
        self.trace = found or self.trace
        return found

    def save(self) -> None:
        """Keep the answers that are new."""
        for answers in self._answers.values():
            answers.save()
