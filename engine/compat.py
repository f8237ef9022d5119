"""The compatibility rules, and what they say of a list of optimizers. To add a rule: `schema/compatibility.yaml`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine import documents, paths, validation
from engine.errors import IncompatibleError
from engine.values import Step
from engine.words import listing


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of `schema/compatibility.yaml`."""

    id: str
    kind: str
    subjects: tuple[str, ...]
    when: tuple[tuple[str, Any], ...]
    because: str
    remedy: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A rule that speaks of the list at hand, and the optimizers in the list that it speaks of."""

    rule: Rule
    subjects: tuple[str, ...]

    @property
    def breaks(self) -> bool:
        """Whether the list cannot be used; otherwise it is a thing to know."""
        return self.rule.kind != "no_effect"

    @property
    def sentence(self) -> str:
        match self.rule.kind:
            case "excludes":
                return f"{listing(self.subjects)} cannot be combined"
            case "before":
                return f"{self.subjects[0]} must come before {self.subjects[1]}"
            case "requires":
                return f"{self.subjects[0]} cannot be used here"
        return f"{listing(self.subjects)} will have no effect"


@cache
def rules() -> tuple[Rule, ...]:
    """Return the shipped rules, in their file's order."""
    document = documents.read(paths.data_dir("schema") / "compatibility.yaml")
    validation.check_once(document, "compatibility")
    return tuple(
        Rule(**{**entry, "subjects": tuple(entry["subjects"]), "when": tuple(entry.get("when", {}).items())})
        for entry in document.value["rules"]
    )


def situation(
    steps: Sequence[Step],
    device: str,
    batch: int,
    tiling_starts: bool | None,
    *,
    can_fuse_qkv: bool | None = None,
    can_slice_attention: bool | None = None,
    widens_vae_in: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return the facts that rules may ask for in `when`; None is not known."""
    params = {s.name: s.params for s in steps}
    compute = params.get("layerwise_casting", {}).get("compute")
    dtype = params.get("dtype", {"value": "float32"})["value"]
    group = params.get("group_offload")
    streams_leaves = group is not None and group["type"] == "leaf_level" and group["use_stream"]
    return {
        "device": device,
        "batch": batch,
        "tiling_starts": tiling_starts,
        "can_fuse_qkv": can_fuse_qkv,
        "can_slice_attention": can_slice_attention,
        "casting_computes_in_the_dtype": None if compute is None or dtype == "auto" else compute in ("auto", dtype),
        "widens_a_streamed_vae": streams_leaves
        and (None if widens_vae_in is None or dtype == "auto" else dtype in widens_vae_in),
    }


def findings(steps: Sequence[Step], facts: Mapping[str, Any]) -> tuple[Finding, ...]:
    """Return every rule that speaks of these steps, in this order, under these facts."""
    names = [s.name for s in steps]
    return tuple(Finding(rule=r, subjects=found) for r in rules() if (found := _subjects(r, names, facts)))


def _subjects(rule: Rule, names: Sequence[str], facts: Mapping[str, Any]) -> tuple[str, ...]:
    if any(facts.get(fact) != value for fact, value in rule.when):
        return ()
    present = tuple(s for s in rule.subjects if s in names)
    match rule.kind:
        case "excludes":
            return present if len(present) > 1 else ()
        case "before" if len(present) == 2:
            first, second = present
            return present if names.index(first) > names.index(second) else ()
        case "before":
            return ()
    return present


def refusal(broken: Sequence[Finding]) -> IncompatibleError:
    """Return the error that names every broken rule."""
    return IncompatibleError(
        "; ".join(f.sentence for f in broken),
        "; ".join(dict.fromkeys(f"{f.rule.because} (rule {f.rule.id})" for f in broken)),
        "; ".join(dict.fromkeys(f.rule.remedy for f in broken)),
    )
