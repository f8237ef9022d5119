"""Load a pipeline as planned, then apply and verify the plan's optimizers in their order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from engine import collector, optimizers
from engine.errors import DgRunError, IncompatibleError, ModelError, NothingFitsError, OutOfMemoryError
from engine.facts import classes, integrity
from engine.facts.model import Model
from engine.optimizers import placing, staged_encoding
from engine.optimizers.spec import Context, NotApplied, modules, on
from engine.plan import Plan
from engine.run import applied, callers, device, download, fuse, interrupt, lacking, lock, parts, progress
from engine.run.download import Local
from engine.run.parts import Parts
from engine.run.progress import Progress, Quiet
from engine.values import Rejection, Step

_MOST_TOLD = 3
# While a model is made, accelerate 1.15 (big_modeling.py, init_on_device) has torch's own `Module.register_parameter`
# exchanged, for the whole process: of two threads that load at once, one would leave it so for good.
_LOADING = threading.RLock()
_OF_MEMORY = ("estimate.", "remembered.")


def load(plan: Plan, told: Progress | None = None, *, debug: bool = False) -> Any:
    """Return the plan's pipeline, ready to be called. Raises: IncompatibleError, for one that is made in stages."""
    told = told or Quiet()
    refuse_unfit(plan)
    _refuse_staged(plan)
    with opened(plan, told, debug=debug) as source:
        here = context(plan)
        _refuse_unknown(plan, source)
        try:
            whole = source.parts()
        except ModelError:  # what cannot be built of its configuration alone comes as the library loads it
            if plan.request.loras:  # which are held against what it is built of
                raise
            whole = None
        if whole is not None:
            return made(whole, list(whole.twins), plan.optimizers, {}, here, told, idle(plan))
        with told.stage(f"loading {plan.request.model}"):
            pipe = source.pipeline()
        return apply_all(plan.optimizers, pipe, here, told, idle(plan))


@dataclass(frozen=True, slots=True)
class Source:
    """Where a plan's pipeline is loaded from."""

    plan: Plan
    files: Local

    @property
    def model(self) -> Model:
        """What is known of the model, from its files."""
        return self.files.model

    def pipeline(self, given: Mapping[str, Any] | None = None) -> Any:
        """Return the pipeline, loaded but for the components that are given."""
        own = self.plan.request.pipeline_class in (None, self.model.pipeline_class)
        return _from_pretrained(self.plan, self.files, given or {}, None if own else self.plan.request.pipeline_class)

    def parts(self) -> Parts:
        """Return how it is loaded in parts. Raises: ModelError, when its classes do not take their configurations."""
        absent = self.plan.request.components
        twins = parts.twins(self.model, context(self.plan).dtype, absent)
        return Parts(make=self.pipeline, twins=twins, change=fuse.fusing(self.plan.request, self.model, twins))


@contextlib.contextmanager
def opened(plan: Plan, told: Progress, *, debug: bool = False) -> Iterator[Source]:
    """Fetch the model where it is not here, start the libraries on the plan's card, and hold its lock while it loads.

    Raises: ModelError, HardwareError, FileError.
    """
    files = fetched(plan, told)
    with lock.held(plan.card, told.say), _LOADING:
        with told.stage("starting torch and diffusers"), interrupt.held_back(), collector.off():
            _before_start(plan)
            device.choose(plan)
            progress.settle_libraries(told, debug=debug)
        yield Source(plan, files)


def fetched(plan: Plan, told: Progress | None = None) -> Local:
    """Return the plan's model, all of whose files are on this machine afterwards. Nothing is asked where they are.

    A download takes as long as it takes: who holds a card's lock, or is about to, calls this before.
    Raises: ModelError, FileError; HardwareError, for a plan that no card here can run.
    """
    device.refuse_imagined(plan)  # before gigabytes are fetched for nothing
    return download.local(plan.request, context(plan).dtype, told or Quiet())


def _before_start(plan: Plan) -> None:
    """Let the steps act that act before CUDA starts. Raises: IncompatibleError, when one comes too late."""
    for step in plan.optimizers:
        hook = getattr(optimizers.get(step.name), "before_start", None)
        if hook is not None and step.name not in idle(plan):
            hook(step)


def refuse_unfit(plan: Plan) -> None:
    """Raises: NothingFitsError, when a plan says that nothing fits."""
    if plan.fits is False:
        raise NothingFitsError(
            f"nothing fits for {plan.request.model} on this machine",
            "; ".join(f"{r.profile}: {r.because}" for r in nearest(plan.rejected)),
            _would_fit(plan) + ("; --force runs the list all the same" if plan.request.exact else ""),
        )


def _would_fit(plan: Plan) -> str:
    """Return the smallest changes that would let a plan fit, where they were looked for; else what can be tried."""
    cpu = "or run without the card (--device cpu)"
    if not plan.advice:
        return f"free VRAM, ask for less (--height, --width), {cpu}"
    return f"it would fit with {'; or '.join(a.change for a in plan.advice)}; {cpu}"


def nearest(rejections: Sequence[Rejection]) -> list[Rejection]:
    """Return the few that came nearest to fitting; those of a profile as a whole where nothing else is said."""
    short = sorted((r for r in rejections if r.rule.startswith(_OF_MEMORY)), key=lambda r: r.short_bytes or 0)
    return list(short[:_MOST_TOLD] or rejections[: 2 * _MOST_TOLD])


def _refuse_staged(plan: Plan) -> None:
    if staged_encoding.is_in(plan.optimizers):
        raise staged_encoding.refused()


def context(plan: Plan) -> Context:
    """Return where the plan is applied. A plan without `dtype` computes as the library loads, in float32."""
    dtype = next((str(s.params["value"]) for s in plan.optimizers if s.name == "dtype"), "float32")
    if dtype == "auto":
        raise IncompatibleError(
            "the plan leaves the dtype open",
            "its card's compute capability was not known",
            "plan again on the card itself",
        )
    return Context(device=plan.torch_device, dtype=dtype)


def idle(plan: Plan) -> frozenset[str]:
    """Return the optimizers that the plan says have no effect."""
    return frozenset(n.optimizer for n in plan.notes if n.kind == "no_effect" and n.optimizer is not None)


def _from_pretrained(plan: Plan, files: Local, given: Mapping[str, Any], other_class: str | None) -> Any:
    """Return the pipeline of a model's files; `other_class` makes it of the same components. Raises: ModelError."""
    import torch
    from safetensors import SafetensorError

    made_by = _class(other_class or "DiffusionPipeline")
    here = context(plan)
    arguments: dict[str, Any] = {}
    for step in plan.optimizers:
        arguments |= optimizers.get(step.name).load_arguments(step, here)
    if files.variant is not None:
        arguments["variant"] = files.variant
    arguments |= dict(given) | dict(plan.request.components)  # None: not loaded
    try:
        with lacking.told() as heard:
            pipe = made_by.from_pretrained(
                files.folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **arguments
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError("the device ran out of memory while loading", str(error).splitlines()[0]) from error
    except (
        *(OSError, ValueError, AttributeError, ImportError, RuntimeError, KeyError, TypeError),
        SafetensorError,
    ) as error:
        # What the libraries raise on a damaged or foreign model is not one class; all of it is the model's fault.
        # A file that went or was cut off since it was looked at is named.
        integrity.check(files.model, plan.request.components, files.variant)
        raise ModelError(
            f"the model {plan.request.model} cannot be loaded",
            " ".join(str(error).split())[:400] or type(error).__name__,
            "check the directory or download it again; --debug shows the libraries' own words",
        ) from error
    _refuse_lacking(plan, pipe, given, heard)
    return pipe


def _refuse_lacking(plan: Plan, pipe: Any, given: Collection[str], heard: lacking.Told) -> None:
    """Refuse weights that no file held. Raises: ModelError."""
    for name, module in modules(pipe).items():
        if name in given:
            continue
        if lost := heard.of(module):
            raise ModelError(
                f"the model {plan.request.model} is incomplete",
                f"the files of {name} lack {len(lost)} of its weights, such as {lost[0]}",
                "they are of another version of the model, or damaged: download the model again",
            )


def _class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None) if classes.is_public_class(name) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ModelError(
            f"diffusers has no pipeline {name}", f"installed is {diffusers.__version__}", "update diffusers"
        )
    return found


def made(
    whole: Parts,
    names: Sequence[str],
    steps: Sequence[Step],
    given: Mapping[str, Any],
    here: Context,
    told: Progress,
    idle: Collection[str] = (),
) -> Any:
    """Return a pipeline of these components (all others None), every step applied and seen to hold.

    Where all of it is to be on the device, each component is there before the next one is loaded: the host never holds
    the whole model. `given` are components that have no weights and were loaded before.
    """
    done: set[str] = set()
    is_moved = _goes_by_component(steps, names, here)

    def settle(name: str, module: Any) -> None:
        """What changes weights acts on the host, before they are on the device."""
        if not is_moved:
            return
        alone = SimpleNamespace(components={name: module}, **{name: module})
        for step in steps:
            if _is_passed_over(step, here, idle) or not optimizers.spec(step.name).changes_weights:
                continue
            if (own := on(step, name)) is not None:
                _apply(own, alone, here)
                done.add(step.name)
        module.to(here.device)

    with told.stage("loading the model" if len(names) == len(whole.twins) else f"loading {', '.join(names)}"):
        if "motion_adapter" in names:  # AnimateDiff makes one component of two others while the pipeline is made
            pipe = whole.loaded(names, given, told)
        else:
            pipe = whole.loaded((), whole.one_by_one(names, given, settle, told), told)
    for name in whole.twins:
        if name not in names:
            setattr(pipe, name, None)
    return apply_all(steps, pipe, here, told, idle, done)


def _goes_by_component(steps: Sequence[Step], names: Sequence[str], here: Context) -> bool:
    """Whether components are put on the device as they come. The offloads begin with everything on the host."""
    placed = placing.placements(placing.spread(steps, names))
    return here.has_accelerator and "motion_adapter" not in names and {s.name for s in placed} <= {placing.RESIDENT}


def _refuse_unknown(plan: Plan, source: Source) -> None:
    placing.refuse_unknown(plan.optimizers, [*source.model.parts, *plan.request.components])


def apply(plan: Plan, pipe: Any, told: Progress | None = None) -> Any:
    """Return `pipe`, which the caller has loaded, with every step applied and seen to hold, in the plan's order.

    Where just this was applied to it before, it is only seen to hold. Raises: IncompatibleError, for a pipeline of
    other components than were planned, or one that is modified otherwise; as `apply_steps`.
    """
    refuse_unfit(plan)
    _refuse_staged(plan)
    if plan.request.loras:
        raise IncompatibleError(
            "the plan fuses LoRAs while it loads, which a loaded pipeline is too late for",
            "whether they are in its weights already cannot be seen",
            "plan.load() fuses them; or fuse your own and plan without: pipe.fuse_lora(), pipe.unload_lora_weights()",
        )
    callers.refuse_other(plan, pipe, told or Quiet())
    with _LOADING:  # `fuse_qkv` makes layers
        return apply_steps(plan, pipe, context(plan), told)


def apply_steps(plan: Plan, pipe: Any, here: Context, told: Progress | None = None) -> Any:
    """Return `pipe` with a plan's steps applied where `here` says, whether or not the plan is expected to fit."""
    _refuse_staged(plan)
    told = told or Quiet()
    planned = _planned(plan.optimizers, pipe)
    if (before := applied.is_there(pipe, planned, here)) is not None:
        told.say("  already applied")
        for step in before.acted:
            told.say(f"  {step.name}: {apply_one(step, pipe, here, is_done=True)}")
        return pipe
    there = callers.already(planned, pipe, here)
    return apply_all(plan.optimizers, pipe, here, told, idle(plan), there=there)


def verify_after_call(pipe: Any) -> dict[str, str]:
    """Return what is seen to hold once a pipeline was called, by step: where its weights are then.

    Nothing is seen of a pipeline to which no plan was applied. Raises: NotApplied, with the optimizer's name.
    """
    seen: dict[str, str] = {}
    before = applied.of(pipe)
    if before is None:
        return seen
    for step in before.acted:
        settled = optimizers.optional(step.name, "settled")
        if settled is not None:
            seen[str(step)] = settled(pipe, step, before.here)
    return seen


def undo(plan: Plan, pipe: Any, told: Progress | None = None) -> None:
    """Take back what was done to `pipe` by this plan. Raises: as `engine.run.applied.undo`."""
    _refuse_staged(plan)
    applied.undo(pipe, _planned(plan.optimizers, pipe), context(plan), told or Quiet())


def _planned(steps: Sequence[Step], pipe: Any) -> tuple[Step, ...]:
    """Return steps as they are applied to a pipeline. Raises: UsageError, for components that it does not have."""
    placing.refuse_unknown(steps, [*modules(pipe), *(n for n, c in pipe.components.items() if c is None)])
    return placing.spread(steps, modules(pipe))


def apply_all(
    steps: Sequence[Step],
    pipe: Any,
    here: Context,
    told: Progress,
    idle: Collection[str] = (),
    done: Collection[str] = (),
    there: Collection[str] = (),
) -> Any:
    """Return `pipe` with every step applied and seen to hold, in their order; of those in `done` it is only seen.

    Steps in `idle` are said to have no effect on it. Those in `there` were true of it before, by somebody else's doing:
    they too are only seen, and are not taken back when the others are.
    """
    planned, acted = _planned(steps, pipe), []
    for step in planned:
        if _is_passed_over(step, here, idle):
            told.say(f"  {step.name}: no effect {_where(step, here)}")
            continue
        try:
            is_done = step.name in done or step.name in there
            told.say(f"  {step.name}: {apply_one(step, pipe, here, is_done=is_done)}")
            acted += [step] if step.name not in there else []
        except IncompatibleError:
            if step.name not in idle:
                raise
            told.say(f"  {step.name}: no effect on this model")
    applied.keep(pipe, planned, acted, here)
    return pipe


def _where(step: Step, here: Context) -> str:
    spec = optimizers.spec(step.name)
    is_of_card = spec.is_placement or spec.is_of_process
    return "without an accelerator" if is_of_card and not here.has_accelerator else "on this model"


def _is_passed_over(step: Step, here: Context, idle: Collection[str]) -> bool:
    spec = optimizers.spec(step.name)
    without_card = spec.is_placement and not here.has_accelerator
    return step.name in idle and (without_card or spec.changes_computing or spec.is_of_process)


def apply_one(step: Step, pipe: Any, here: Context, *, is_done: bool = False) -> str:
    """Apply a step, unless it is done, and return what is seen of it. Raises: IncompatibleError, OutOfMemoryError."""
    try:
        if not is_done:
            _apply(step, pipe, here)
        return optimizers.get(step.name).verify(pipe, step, here)
    except NotApplied as error:
        if optimizers.get(step.name).load_arguments(step, here):
            raise IncompatibleError(
                f"{step.name} acts while a pipeline is loaded, and is not true of this one",
                error.why,
                "load the pipeline so, or let plan.load() do it",
            ) from None
        raise


def _apply(step: Step, pipe: Any, here: Context) -> None:
    try:
        optimizers.get(step.name).apply(pipe, step, here)
    except DgRunError:
        raise
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise OutOfMemoryError(
                f"the device ran out of memory at {step.name}", str(error).splitlines()[0], "take a more frugal profile"
            ) from error
        raise IncompatibleError(
            f"{step.name} cannot be applied to {type(pipe).__name__}", " ".join(str(error).split())[:400]
        ) from error
