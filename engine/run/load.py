"""Load a pipeline as planned, then apply and verify the plan's optimizers in their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import facts, optimizers
from engine.errors import DgRunError, IncompatibleError, ModelError, NothingFitsError, OutOfMemoryError
from engine.facts import integrity
from engine.optimizers import placing
from engine.optimizers.group_offload import HOOK as GROUP_HOOK
from engine.optimizers.spec import Context, NotApplied, modules
from engine.plan import Plan
from engine.run import device, interrupt, lock, progress
from engine.run.progress import Progress, Quiet
from engine.values import Rejection, Step

_MOST_TOLD = 3


def load(plan: Plan, told: Progress | None = None, *, debug: bool = False) -> Any:
    """Return the plan's pipeline, ready to be called."""
    told = told or Quiet()
    refuse_unfit(plan)
    model = facts.find(plan.request.model, plan.request.revision)
    integrity.check(model)
    where = str(model.path) if model.source in ("embedded", "directory") else model.id
    with lock.held(plan.card, told.say):
        with told.stage("starting torch and diffusers"), interrupt.held_back():
            device.choose(plan)
            progress.settle_libraries(told, debug=debug)
        with told.stage(f"loading {plan.request.model}"):
            pipe = _from_pretrained(plan, where)
        return apply(plan, pipe, told)


def refuse_unfit(plan: Plan) -> None:
    """Raises: NothingFitsError, when a plan says that nothing fits; IncompatibleError, when it can only be read."""
    for step in plan.optimizers:
        if optimizers.spec(step.name).planned_only:
            raise IncompatibleError(
                f"{step.name} is estimated by this version, and not run",
                "the plan can be read and compared",
                f"leave {step.name} out",
            )
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
    short = sorted((r for r in rejections if r.rule.startswith("estimate.")), key=lambda r: r.short_bytes or 0)
    return list(short[:_MOST_TOLD] or rejections[: 2 * _MOST_TOLD])


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


def _from_pretrained(plan: Plan, where: str) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    here = context(plan)
    arguments: dict[str, Any] = {}
    for step in plan.optimizers:
        arguments |= optimizers.get(step.name).load_arguments(step, here)
    if plan.request.revision is not None and where == plan.request.model:
        arguments["revision"] = plan.request.revision
    arguments |= dict(plan.request.components)  # None: not loaded
    try:
        return DiffusionPipeline.from_pretrained(where, use_safetensors=True, trust_remote_code=False, **arguments)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError("the device ran out of memory while loading", str(error).splitlines()[0]) from error
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError, KeyError, TypeError) as error:
        # What the libraries raise on a damaged or foreign model is not one class; all of it is the model's fault.
        raise ModelError(
            f"the model {plan.request.model} cannot be loaded",
            " ".join(str(error).split())[:400] or type(error).__name__,
            "check the directory or download it again; --debug shows the libraries' own words",
        ) from error


def apply(plan: Plan, pipe: Any, told: Progress | None = None) -> Any:
    """Return `pipe` with every step applied and seen to hold, in the plan's order."""
    refuse_unfit(plan)
    return apply_steps(plan, pipe, context(plan), told)


def apply_steps(plan: Plan, pipe: Any, here: Context, told: Progress | None = None) -> Any:
    """Return `pipe` with a plan's steps applied where `here` says, whether or not the plan is expected to fit."""
    told = told or Quiet()
    _refuse_placed(pipe)
    idle = {n.optimizer for n in plan.notes if n.kind == "no_effect"}
    placing.refuse_unknown(plan.optimizers, [*modules(pipe), *(n for n, c in pipe.components.items() if c is None)])
    for step in placing.spread(plan.optimizers, modules(pipe)):
        spec = optimizers.spec(step.name)
        if step.name in idle and not here.has_accelerator and spec.is_placement:
            told.say(f"  {step.name}: no effect without an accelerator")
            continue
        if step.name in idle and spec.changes_computing:
            told.say(f"  {step.name}: no effect on this model")
            continue
        try:
            told.say(f"  {step.name}: {_apply_one(step, pipe, here)}")
        except IncompatibleError:
            if step.name not in idle:
                raise
            told.say(f"  {step.name}: no effect on this model")
    return pipe


def _apply_one(step: Step, pipe: Any, here: Context) -> str:
    optimizer = optimizers.get(step.name)
    try:
        optimizer.apply(pipe, step, here)
        return optimizer.verify(pipe, step, here)
    except NotApplied as error:
        if optimizer.load_arguments(step, here):
            raise IncompatibleError(
                f"{step.name} acts while a pipeline is loaded, and is not true of this one",
                error.why,
                "load the pipeline so, or let plan.load() do it",
            ) from None
        raise
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


def _refuse_placed(pipe: Any) -> None:
    """Refuse a pipeline on which hooks already decide where weights are: a second placement would fight the first."""
    hooked = [n for n, m in modules(pipe).items() if any(_places(part) for part in m.modules())]
    if hooked:
        raise IncompatibleError(
            f"the pipeline is already offloaded ({', '.join(hooked)})",
            "a plan is applied to a pipeline on which nothing has been placed yet",
            "load the pipeline anew; pipe.remove_all_hooks() is enough after model_offload",
        )


def _places(module: Any) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and registry.get_hook(GROUP_HOOK) is not None)
