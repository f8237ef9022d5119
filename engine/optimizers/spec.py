"""What every optimizer's module says about itself, and what it is given. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from engine.errors import DgRunError, UsageError
from engine.facts import attention
from engine.values import FrozenDict, Step
from engine.words import did_you_mean

Pipeline = Any
"""A diffusers pipeline: its type is never imported here, so that reading a spec costs nothing."""

MAX_NAMES, MAX_NAME_LENGTH = 64, 100
_MOST = {"count": 1024, "pixels": 4096}
"""The largest number of a kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter: its type, its default, and (for words) its choices."""

    name: str
    kind: Literal["word", "bool", "count", "names", "pixels", "share"]
    """"names" is a tuple of components' names, each once; None where none are named. "share" is above 0, at most 1."""
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    opens: bool = False
    """Whether "auto" may stand for it in a profile: the solver then decides (`engine/solve/values.py`)."""

    def json_schema(self) -> dict[str, Any]:
        """Return the parameter as a JSON Schema."""
        base: dict[str, Any] = {"description": self.about}
        if self.default is not None:
            base["default"] = self.default
        return base | ({"anyOf": [self._schema(), {"const": "auto"}]} if self.opens else self._schema())

    def _schema(self) -> dict[str, Any]:
        match self.kind:
            case "word":
                return {"enum": list(self.choices)}
            case "bool":
                return {"type": "boolean"}
            case "share":
                return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
            case "names":
                return {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_NAMES,
                    "uniqueItems": True,
                    "items": {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH},
                }
        return {"type": "integer", "minimum": 1, "maximum": _MOST[self.kind]}

    def checked(self, owner: str, value: Any) -> Any:
        """Return `value` if it is one this parameter can have. Raises: UsageError."""
        if self.opens and value == "auto":
            return value
        if value is None and self.default is None:
            return value
        if self.kind == "word":
            if value in self.choices:
                return value
            raise UsageError(f"{owner}: {self.name} cannot be {value!r}", do=did_you_mean(str(value), self.choices))
        if self.kind == "names":
            if _are_names(value):
                return tuple(value)
            do = "give a list of components' names, each once, such as [vae]"
            raise UsageError(f"{owner}: {self.name} cannot be {value!r}", do=do)
        is_bool = isinstance(value, bool)
        if self.kind == "share":
            if isinstance(value, int | float) and not is_bool and 0 < value <= 1:
                return value
            raise UsageError(f"{owner}: {self.name} cannot be {value!r}", do="give a number above 0, and at most 1")
        most = _MOST.get(self.kind, 0)
        if is_bool if self.kind == "bool" else isinstance(value, int) and not is_bool and 1 <= value <= most:
            return value
        wanted = "true or false" if self.kind == "bool" else f"a whole number from 1 to {most}"
        raise UsageError(f"{owner}: {self.name} cannot be {value!r}", do=f"give {wanted}")


def _are_names(value: Any) -> bool:
    """Whether a value is a list of names that a pipeline's components can have, each once."""
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_NAMES:
        return False
    are_words = all(isinstance(n, str) and 1 <= len(n) <= MAX_NAME_LENGTH for n in value)
    return are_words and len(set(value)) == len(value)


COMPONENTS = Param(
    name="components",
    kind="names",
    default=None,
    about="the components whose weights it places, by name; left out: all that no other placement names",
    opens=True,
)
"""What every placement takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A plain description, enough for schemas, rules and plans."""

    name: str
    summary: str
    slot: int
    """Where it stands in a list whose order nobody chose; `docs/optimizers.md` gives the reasons."""
    quality: Literal["exact", "near", "lossy"] = "exact"
    is_placement: bool = False
    changes_computing: bool = False
    """Whether it changes which operators compute, or which weights there are: then a dry run applies it too. It must
    act on a pipeline without weights (on meta) as it does on a loaded one."""
    changes_computing_with: str | None = None
    """A parameter that changes what is computed where it is given: then a dry run applies it too (`apply_dry`)."""
    params: tuple[Param, ...] = ()
    is_of_process: bool = False
    """Whether it sets what is the process's, and no pipeline's: it is passed over where it has no effect."""
    changes_weights: bool = False
    """Whether it makes other weights of a component's own: it acts before they are on the device (`on`)."""
    lasts: str | None = None
    """Why what it does to a pipeline cannot be taken back; None where its module has `undo`."""
    scalar: bool = False
    """Whether a profile may write `name: value` for its one parameter, `value`."""

    def step(self, params: Mapping[str, Any] | None = None) -> Step:
        """Return a step with defaults filled in; a parameter that is None is left out.

        Raises: UsageError, naming the nearest right parameter.
        """
        given = dict(params or {})
        known = {p.name: p for p in self.params}
        for name in given:
            if name not in known:
                raise UsageError(f"{self.name} has no parameter {name!r}", do=did_you_mean(name, known))
        chosen = {n: p.checked(self.name, given.get(n, p.default)) for n, p in known.items()}
        return Step(name=self.name, params=FrozenDict({n: v for n, v in chosen.items() if v is not None}))

    def changes(self, step: Step) -> bool:
        """Whether a step of this optimizer changes what is computed, and so what is traced."""
        return self.changes_computing or step.params.get(self.changes_computing_with or "") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Where a plan is being applied."""

    device: str
    """The torch device the pipeline runs on, as "cuda" or "cpu"."""
    dtype: str
    """The compute dtype as planned, as "bfloat16"."""

    @property
    def has_accelerator(self) -> bool:
        return self.device != "cpu"


class NotApplied(DgRunError):
    """An optimizer was applied and the pipeline does not show it."""

    def __init__(self, name: str, saw: str) -> None:
        super().__init__(
            f"{name} was applied but did not take effect", saw, "report this with the output of `dg-run doctor`"
        )


class Optimizer(Protocol):
    """The names an optimizer's module has."""

    SPEC: Spec

    def load_arguments(self, step: Step, context: Context) -> dict[str, Any]:
        """Return what it adds to `from_pretrained`."""

    def apply(self, pipe: Pipeline, step: Step, context: Context) -> None:
        """Change the pipeline."""

    def verify(self, pipe: Pipeline, step: Step, context: Context) -> str:
        """Return one line of what is seen to hold on the pipeline. Raises: NotApplied."""

    # What only some modules have (`engine.optimizers.optional`):
    #
    # apply_dry(pipe, step, context) -> None      takes the place of `apply` in a dry run
    # not_estimated(step) -> str | None           why there is no estimate of a run with it; None: there is one
    # undo(pipe, step, context) -> None           takes back what `apply` did, its memory too; a module without it
    #                                             cannot be taken back
    # settled(pipe, step, context) -> str         one line of what is seen to hold after a call of the pipeline: where
    #                                             weights are then. Raises: NotApplied
    # seen(pipe, context) -> str | None           what a pipeline shows of it, whoever did it; None: nothing
    # before_start(step) -> None                  is called before CUDA starts


def nothing_to_load(step: Step, context: Context) -> dict[str, Any]:
    """The `load_arguments` of an optimizer that acts on a loaded pipeline."""
    return {}


def modules(pipe: Pipeline) -> dict[str, Any]:
    """Return the pipeline's components that have weights, by name."""
    import torch

    return {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def named(step: Step) -> tuple[str, ...] | None:
    """Return the components that a step names; None where it names none. Raises: UsageError, while that is open."""
    components = step.params.get("components")
    if components == "auto":
        raise UsageError(
            f"{step.name}: which components it acts on is open",
            "auto is for profiles, where the solver decides",
            "name the components, or leave them out",
        )
    return None if components is None else tuple(components)


def on(step: Step, component: str) -> Step | None:
    """Return a step that changes weights as it acts on one component alone; None where it leaves that as it is.

    Without names it acts on what denoises.
    """
    wanted = named(step)
    if component not in (attention.DENOISERS if wanted is None else wanted):
        return None
    alone = {} if wanted is None else {"components": (component,)}
    return replace(step, params=FrozenDict({**step.params, **alone}))


def held(pipe: Pipeline, step: Step) -> dict[str, Any]:
    """Return the components with weights that a placement holds, by name: all of them where it names none.

    `engine.optimizers.placing.spread` names those of a step that holds the rest.
    """
    wanted = named(step)
    return {n: m for n, m in modules(pipe).items() if wanted is None or n in wanted}


def left_out(pipe: Pipeline, step: Step) -> tuple[str, ...]:
    """Return the names of the components with weights that other placements hold."""
    own = held(pipe, step)
    return tuple(n for n in modules(pipe) if n not in own)


def is_vae(component: str) -> bool:
    """Whether a component is an autoencoder, by its name: `encode` and `decode` bypass the hooks on its forward."""
    return component in ("vae", "vqvae", "audio_vae")


def denoisers(pipe: Pipeline) -> dict[str, Any]:
    """Return the components that denoise, by name."""
    found = {n: getattr(pipe, n, None) for n in attention.DENOISERS}
    return {n: m for n, m in found.items() if m is not None}


def names(items: Sequence[str] | Mapping[str, Any]) -> str:
    """Return component names for a line of text."""
    return ", ".join(items) or "nothing"
