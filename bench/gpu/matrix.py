"""The cases that there are to measure: from `matrix.yaml` to frozen values, each with an id that stays the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from engine import arguments, documents, facts, optimizers
from engine.errors import UsageError
from engine.units import GIB
from engine.values import FrozenDict, Step
from engine.words import did_you_mean

FILE = Path(__file__).with_name("matrix.yaml")
KINDS = ("machine", "exact", "required", "chosen", "recipe")
# The axes of a block, by its kind; the models vary fastest, so that a run that is cut short has seen each of them.
_AXES = {
    "machine": ("parts",),
    "exact": ("batches", "dtypes", "sizes", "with", "placements"),
    "required": ("batches", "dtypes", "sizes", "with", "margins", "placements"),
    "chosen": ("batches", "sizes", "budgets"),
    "recipe": ("batches", "dtypes", "sizes", "budgets", "recipes"),
}
_USUAL: dict[str, list[Any]] = {"batches": [1], "dtypes": ["usual"], "sizes": ["usual"], "with": [[]]}
_STEPS = re.compile(r"/(\d+)steps/?")
_SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure. What is None has no meaning for its kind, or is left to the pipeline."""

    kind: str
    part: str | None = None
    """Of the machine's measures."""
    name: str | None = None
    """The model's, within the matrix."""
    model: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    steps: int | None = None
    dtype: str | None = None
    placement: str | None = None
    extras: tuple[str, ...] = ()
    optimizers: tuple[Step, ...] = ()
    """The exact list; () where dg-run chooses, or a recipe does."""
    margin: float | None = None
    """What the card has beyond what is said to be required, as a share of that."""
    budget_bytes: int | None = None
    """The size of the card that is emulated."""
    recipe: str | None = None

    @property
    def id(self) -> str:
        """What a case is known by: everything that makes it another measurement, and nothing else."""
        if self.kind == "machine":
            return "/".join(filter(None, (self.kind, self.part, self.name)))
        size = f"{self.width}x{self.height}" + (f"x{self.frames}" if self.frames else "")
        batch = f"batch{self.batch}" if self.batch > 1 else None
        budget = None if self.budget_bytes is None else f"{self.budget_bytes / GIB:g}GiB"
        margin = None if self.margin is None else f"{self.margin:+.1%}"
        how = "+".join((self.placement, *self.extras)) if self.placement else self.recipe
        return "/".join(
            filter(None, (self.kind, self.name, size, batch, f"{self.steps}steps", self.dtype, how, budget, margin))
        )

    def plain(self) -> dict[str, Any]:
        """Return the case as a record keeps it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Case:
        """Return a case from a record."""
        steps = tuple(Step(name=s["name"], params=FrozenDict(s["params"])) for s in plain["optimizers"])
        return cls(**{**plain, "optimizers": steps, "extras": tuple(plain["extras"])})


@cache
def _document() -> dict[str, Any]:
    content: dict[str, Any] = documents.read(FILE).value
    return content


def sets() -> tuple[str, ...]:
    """Return the names of the sets."""
    return tuple(_document()["sets"])


def cases(
    name: str,
    *,
    models: Sequence[str] = (),
    budgets_bytes: Sequence[int] = (),
    steps: int | None = None,
) -> tuple[Case, ...]:
    """Return the cases of a set, the most informative first. `models` and `budgets_bytes` narrow and replace its own.

    Raises: UsageError, for a name that is not in the matrix.
    """
    content = _document()
    if name not in content["sets"]:
        raise UsageError(f"the matrix has no set {name!r}", do=did_you_mean(name, content["sets"]))
    for model in models:
        if model not in content["models"]:
            raise UsageError(f"the matrix has no model {model!r}", do=did_you_mean(model, content["models"]))
    found: dict[str, Case] = {}
    for block in content["sets"][name]:
        for case in _block(content, block, models, budgets_bytes, steps or content["steps"]):
            found.setdefault(case.id, case)
    return tuple(found.values())


def named(ids: Sequence[str]) -> tuple[Case, ...]:
    """Return the cases of these ids, in this order, of whatever set; their steps may be others than the matrix's.

    Raises: UsageError, for an id that no set has.
    """
    counts = {int(found[1]) if (found := _STEPS.search(i)) else None for i in ids}
    known = {c.id: c for steps in counts for name in sets() for c in cases(name, steps=steps)}
    for each in ids:
        if each not in known:
            raise UsageError(f"no set has a case {each!r}", do=did_you_mean(each, list(known)))
    return tuple(known[each] for each in dict.fromkeys(ids))


def _block(
    content: dict[str, Any], block: dict[str, Any], models: Sequence[str], budgets: Sequence[int], steps: int
) -> Iterable[Case]:
    kind = block["kind"]
    axes = _AXES[kind]
    unknown = set(block) - {"kind", "models", *axes}
    assert not unknown, f"a block of {kind} has no {unknown}"
    values = [list(budgets) if a == "budgets" and budgets else block.get(a) or _USUAL[a] for a in axes]
    named: list[str | None] = [m for m in block["models"] if not models or m in models] if "models" in block else [None]
    for chosen in itertools.product(*values):
        for name in named:
            yield _case(content, kind, name, dict(zip(axes, chosen, strict=True)), steps)


def _case(content: dict[str, Any], kind: str, name: str | None, at: dict[str, Any], steps: int) -> Case:
    if name is None:
        return Case(kind=kind, part=at["parts"])
    entry = content["models"][name]
    usual = facts.find(entry["id"]).defaults
    dtype = entry["dtype"] if at.get("dtypes", "usual") == "usual" else at["dtypes"]
    if kind == "chosen":  # dg-run's to choose as well
        dtype = None
    size = at.get("sizes", "usual")
    height, width, frames = (usual.height, usual.width, usual.frames) if size == "usual" else _size(size, usual.frames)
    case = Case(
        kind=kind,
        name=name,
        model=entry["id"],
        height=height,
        width=width,
        frames=frames,
        dtype=dtype,
        batch=at.get("batches", 1),
    )
    if kind == "machine":
        return replace(case, part=at["parts"])
    case = replace(
        case,
        steps=steps,
        margin=at.get("margins"),
        budget_bytes=arguments.size("budgets", at.get("budgets")),
        recipe=at.get("recipes"),
    )
    if "placements" not in at:
        return case
    listed = [
        step({"dtype": dtype or "auto"}),
        step(content["placements"][at["placements"]]),
        *(step(content["extras"][extra]) for extra in at["with"]),
    ]
    return replace(case, placement=at["placements"], extras=tuple(at["with"]), optimizers=optimizers.in_order(listed))


def _size(text: str, frames: int | None) -> tuple[int, int, int | None]:
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{text!r} is not a size of the matrix", do="write WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES")
    return int(match[2]), int(match[1]), int(match[3]) if match[3] else frames


def step(entry: str | dict[str, Any]) -> Step:
    """Return a step as profiles write it: `name`, or `name: parameters`."""
    if isinstance(entry, str):
        return arguments.step(entry)
    ((name, params),) = entry.items()
    return arguments.step({"name": name, "params": params if isinstance(params, dict) else {"value": params}})
