"""A pipeline that a caller has loaded: whether it is what a plan is for, and nothing has been done to it already.

Optimizations leave their traces: `seen` of an optimizer's module finds them, whoever did it. What is there as the plan
wants it is left as it is; what is there otherwise, or is not in the plan, would make a run that nobody planned.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine import facts, optimizers
from engine.errors import IncompatibleError, ModelError
from engine.facts import attention
from engine.facts.model import Component, Model
from engine.optimizers.group_offload import HOOK as GROUP_HOOK
from engine.optimizers.spec import Context, NotApplied, denoisers, is_vae, modules, names
from engine.plan import Plan
from engine.run.progress import Progress
from engine.values import Step
from engine.words import listing

_ANEW = "load the pipeline anew"
_NOT_THE_MODELS = ("dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "return_dict")
"""What a configuration says of how a model was saved or is called."""
_MOST_TOLD = 3


def refuse_other(plan: Plan, pipe: Any, told: Progress) -> None:
    """Raises: IncompatibleError, for a pipeline or a component of another class or configuration than was planned.

    A model whose facts cannot be read again (one that was planned for as an object) is not compared, and that is said.
    """
    try:
        model = facts.find(plan.request.model, plan.request.revision)
    except ModelError as error:
        told.say(f"  the components are not compared with {plan.request.model}: {error.what}")
        return
    cls = plan.request.pipeline_class or model.pipeline_class
    if type(pipe).__name__ != cls:
        raise IncompatibleError(f"the pipeline is a {type(pipe).__name__}, and the plan is for a {cls}", do=_PLAN_ANEW)
    live = modules(pipe)
    for name in model.parts:
        if name in plan.request.components or (part := model.components.get(name)) is None:
            continue
        if name not in live:
            raise IncompatibleError(
                f"the pipeline has no {name}, and the plan counts on one",
                "it was taken out, or is not loaded",
                f"plan without it: resolve(…, components={{{name!r}: None}})",
            )
        _refuse_another(name, live[name], part, model)
    for name in plan.request.components:
        if name in live:
            raise IncompatibleError(
                f"the pipeline has a {name}, and the plan is for one without", do=f"pipe.{name} = None, or {_PLAN_ANEW}"
            )


_PLAN_ANEW = "plan for this pipeline: resolve(pipe, …)"


def _refuse_another(name: str, module: Any, part: Component, model: Model) -> None:
    cls = type(module).__name__
    planned = model.class_of(part) if name in attention.DENOISERS else part.cls
    if cls != planned:
        raise IncompatibleError(
            f"{name} of the pipeline is a {cls}, and the plan is for a {planned}", "it was replaced", _PLAN_ANEW
        )
    other = [] if cls != part.cls else list(_differences(module, part))
    if other:
        more = f", and {len(other) - _MOST_TOLD} more" if len(other) > _MOST_TOLD else ""
        raise IncompatibleError(
            f"{name} of the pipeline has another configuration than was planned",
            "; ".join(f"{k} is {live!r}, planned was {was!r}" for k, live, was in other[:_MOST_TOLD]) + more,
            _PLAN_ANEW,
        )


def _differences(module: Any, part: Component) -> Iterator[tuple[str, Any, Any]]:
    """Yield what a module's configuration says otherwise than was planned: the key, what it has, what was planned."""
    live = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    for key, planned in _planned(module, part).items():
        if key.startswith("_") or key in _NOT_THE_MODELS or key not in live:
            continue
        # Stable Diffusion's pipelines correct it in UNets that were saved before diffusers 0.9.
        if key == "sample_size" and part.cls.startswith("UNet"):
            continue
        if _plain(live[key]) != _plain(planned):
            yield key, live[key], planned


def _planned(module: Any, part: Component) -> Mapping[str, Any]:
    """Return a configuration as its class reads it: with its defaults, and under its own names."""
    if part.library == "transformers":
        try:
            read = type(module.config).from_dict(dict(part.config)).to_dict()
        except (TypeError, ValueError, AttributeError, KeyError):  # a configuration class that wants more than it said
            return {}
        return {key: read[key] for key in part.config if key in read}
    taken = inspect.signature(type(module).__init__).parameters.values()
    usual = {p.name: p.default for p in taken if p.default is not inspect.Parameter.empty}
    return usual | dict(part.config)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in _NOT_THE_MODELS}
    return value


def already(steps: Sequence[Step], pipe: Any, here: Context) -> frozenset[str]:
    """Return the names of the steps that are true of a pipeline already, as they are planned.

    Raises: IncompatibleError, for a pipeline on which hooks decide where weights are, a LoRA is loaded and not fused,
        weights are in another precision, or an optimizer acted that is not in the list, or otherwise than planned.
    """
    _refuse_placed(pipe, here)
    _refuse_lora(pipe)
    by_name = {s.name: s for s in steps}
    if "dtype" not in by_name:
        _refuse_precision(pipe, here)
    found = set()
    for name in optimizers.NAMES:
        look = optimizers.optional(name, "seen")
        saw = None if look is None else look(pipe, here)
        if saw is None:
            continue
        step = by_name.get(name)
        if step is None:
            raise IncompatibleError(
                f"{name} acts on this pipeline already, and is not in the plan", saw, f"{_ANEW}, or plan with {name}"
            )
        try:
            optimizers.get(name).verify(pipe, step, here)
        except NotApplied as error:
            raise IncompatibleError(
                f"{name} acts on this pipeline already, otherwise than planned", error.why, _ANEW
            ) from None
        found.add(name)
    return frozenset(found)


def _refuse_placed(pipe: Any, here: Context) -> None:
    """Refuse a pipeline on which hooks already decide where weights are: a second placement would fight the first."""
    hooked = [n for n, m in modules(pipe).items() if any(_places(part) for part in m.modules())]
    if hooked:
        by = [n for n in _placements() if (look := optimizers.optional(n, "seen")) and look(pipe, here)]
        raise IncompatibleError(
            f"the pipeline is already offloaded ({', '.join(hooked)}{f': {listing(by)}' if by else ''})",
            "a plan is applied to a pipeline on which nothing has been placed yet",
            f"{_ANEW}; pipe.remove_all_hooks() is enough after model_offload",
        )


def _placements() -> Iterable[str]:
    return (s.name for s in optimizers.specs() if s.is_placement)


def _places(module: Any) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or (registry is not None and registry.get_hook(GROUP_HOOK) is not None)


def _refuse_lora(pipe: Any) -> None:
    """Refuse a LoRA that computes beside the weights: no plan counts it, and what fuses or casts passes it by."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:  # who has not loaded it cannot have one
        return
    beside = [
        name
        for name, module in modules(pipe).items()
        if any(isinstance(m, peft.BaseTunerLayer) and not m.merged for m in module.modules())
    ]
    if beside:
        raise IncompatibleError(
            f"a LoRA is loaded into {names(beside)} and not fused",
            "it computes beside the weights: no plan counts it, and fuse_qkv and layerwise_casting pass it by",
            "pipe.fuse_lora(), then pipe.unload_lora_weights()",
        )


def _refuse_precision(pipe: Any, here: Context) -> None:
    """Refuse what denoises, or a VAE, in another precision than a plan without `dtype` computes in."""
    own = {**denoisers(pipe), **{n: m for n, m in modules(pipe).items() if is_vae(n)}}
    other = {n: d for n, m in own.items() if (d := str(m.dtype).removeprefix("torch.")) != here.dtype}
    if other:
        raise IncompatibleError(
            f"the plan has no dtype, and would compute in {here.dtype}",
            ", ".join(f"{n} is {d}" for n, d in other.items()),
            "plan with the dtype that the pipeline is in",
        )
