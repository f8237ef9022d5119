"""Write `docs/compatibility.md` from the rules; `--check` only compares.

python -m tools.make_docs [--check]
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import compat
from engine.compat import Fact, Rule
from engine.words import listing

PATH = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
KINDS = {
    "excludes": (
        "What cannot be combined",
        "No two of these can be in one plan. `dg-run` refuses the list, and names the rule.",
    ),
    "requires": (
        "What cannot be used, or needs something else",
        "`dg-run` refuses the list where the rule speaks.",
    ),
    "before": (
        "What must come before what",
        "A profile in the other order is refused; it is never sorted anew in silence.",
    ),
    "no_effect": (
        "What does nothing",
        "It is said in the plan, and the run goes on without it.",
    ),
    "degrades": (
        "What works at a price",
        "It is said in the plan, and the run goes on.",
    ),
}
HEAD = """\
<!-- Made by `python -m tools.make_docs` of schema/compatibility.yaml; do not edit. -->
# Compatibility

What goes together and what does not, as the installed libraries have it: {rules} rules and {facts} facts, of
[`schema/compatibility.yaml`](../schema/compatibility.yaml). Each is shown by a test that runs the libraries' own code,
most of them on a device that counts every byte; where that was not possible it says so. A rule that is bound to
versions is silent on others; one that asks for something of the model or the machine is silent where it is not known.

Rules that need neither are in the JSON Schema of profiles too: an editor underlines `model_offload` beside
`group_offload` while it is typed.

## The matrix

{matrix}

- ✓ goes together: the pair was executed, both took effect, and the picture is the one drawn without the placement.
- (✓) goes together as far as the rules know: xDiT cannot be started without cards, and the pair was not executed.
- ✗ is refused, by the rule that the cell leads to.
"""


def page() -> str:
    """Return the page."""
    whole = compat.shipped()
    parts = [HEAD.format(rules=len(whole.rules), facts=len(whole.facts), matrix=matrix())]
    for kind, (title, about) in KINDS.items():
        parts.append(f"\n## {title}\n\n{about}\n")
        parts += [f"\n{_rule(r)}" for r in whole.rules if r.kind == kind]
    parts.append("\n## Facts\n\nWhat holds of the libraries, and no list of optimizers can break.\n")
    parts += [f"\n{_fact(f)}" for f in whole.facts]
    names = [f"`{n}`{_choices(p)}" for n, p in whole.planned.items()]
    parts.append(
        "\n## Planned\n\nOptimizers, and parameters of some, that rules speak of and this version does not have yet: "
        f"{listing(names)}.\n"
    )
    return "".join(parts)


def matrix() -> str:
    """Return the matrix as a table: a cell is refused where a rule excludes its pair whatever the model."""
    whole = compat.shipped()
    read = {c for w in whole.works if w.basis == "read" for c in w.columns}
    lines = [["", *(f"`{c}`" for c in whole.columns)], ["---"] * (len(whole.columns) + 1)]
    for row in whole.rows:
        cells = [f"`{row}`"]
        for column in whole.columns:
            rule = excluding(row, column)
            if row == column:
                cells.append("–")
            elif rule is not None:
                cells.append(f"[✗](#{rule.id})")
            else:
                cells.append("(✓)" if column in read else "✓")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def excluding(one: str, other: str) -> Rule | None:
    """Return the rule by which two optimizers exclude each other, whatever their parameters and the model."""
    for rule in compat.rules():
        names = [s.optimizer for s in rule.subjects if not s.params]
        if rule.kind == "excludes" and not rule.when and one != other and {one, other} <= set(names):
            return rule
    return None


def _rule(rule: Rule) -> str:
    return f"### {rule.id}\n\n" + "\n".join(f"- {line}" for line in _lines(rule)) + "\n"


def _lines(rule: Rule) -> Iterator[str]:
    names = [f"`{s}`" for s in rule.subjects]
    needs = listing((f"`{s}`" for s in rule.needs), "or")
    match rule.kind:
        case "excludes":
            yield f"{listing(names)}{', where they hold the same component' if rule.overlap else ''}"
        case "before":
            yield f"{names[0]} before {listing(names[1:])}"
        case "requires" if needs:
            yield f"{listing(names) or 'the model'} needs {needs}"
        case _:
            what = f"`{rule.parameter}` of " if rule.parameter else ""
            beside = f" beside {listing((f'`{s}`' for s in rule.beside), 'or')}" if rule.beside else ""
            yield f"{what}{listing(names)}{beside}"
    if rule.when:
        yield f"when {'; '.join(_conditions(rule.when))}"
    yield f"because {rule.because}"
    yield f"do: {rule.remedy}"
    yield _evidence(rule)


def _fact(fact: Fact) -> str:
    return f"### {fact.id}\n\n- {fact.about}: {fact.because}\n- {_evidence(fact)}\n"


def _evidence(entry: Rule | Fact) -> str:
    how = "shown by" if entry.basis == "shown" else "read, not executed:"
    tests = ", ".join(f"`{e}`" for e in entry.evidence)
    more = f" (with {listing(f'`{p}`' for p in entry.packages)})" if entry.packages else ""
    return f"{how} {tests}{more}"


def _conditions(when: Mapping[str, Any]) -> Iterator[str]:
    for name, wanted in when.items():
        match name:
            case "traits":
                for trait, value in wanted.items():
                    yield f"{'' if value else 'it is not so that '}{compat.TRAITS[trait].about}"
            case "component":
                yield _component(wanted)
            case "libraries":
                yield listing(f"{n} {r}" for n, r in wanted.items())
            case "batch" | "gpus" | "compute_capability":
                what = {"batch": "the batch", "gpus": "the number of cards"}.get(name, "the compute capability")
                yield f"{what} is {_range(wanted)}"
            case "pipeline":
                yield f"the pipeline is {_classes(wanted)}"
            case _:
                values = [wanted] if isinstance(wanted, str) else wanted
                yield f"the {name} is {listing(values, 'or')}"


def _range(bounds: Mapping[str, Any]) -> str:
    words = {"at_least": "at least", "below": "below"}
    return listing(f"{words[k]} {v}" for k, v in bounds.items())


def _component(wanted: Mapping[str, Any]) -> str:
    what = {"vae": "the VAE", "denoiser": "a denoiser", "text_encoder": "a text encoder", "any": "a component"}
    told = what[wanted["of"]]
    if "cls" in wanted:
        return f"{told} is {_classes(wanted['cls'])}"
    if "other_than" in wanted:
        return f"{told} is none of {_classes(wanted['other_than'], 'and')}"
    return f"there is {told.replace('the ', 'a ')}"


def _classes(names: Sequence[str], last: str = "or") -> str:
    return listing((f"`{n}`" for n in names), last)


def _choices(params: Mapping[str, Sequence[Any]]) -> str:
    if not params:
        return ""
    told = [f"{n}: {', '.join(str(v).lower() for v in values)}" for n, values in params.items()]
    return f" ({'; '.join(told)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print the difference and exit 1 if there is one")
    options = parser.parse_args()
    wanted = page()
    if not options.check:
        PATH.write_text(wanted, encoding="utf-8")
        return 0
    found = PATH.read_text(encoding="utf-8") if PATH.exists() else ""
    if found == wanted:
        return 0
    sys.stdout.writelines(difflib.unified_diff(found.splitlines(True), wanted.splitlines(True), "committed", "made"))
    print("docs/compatibility.md is stale: run `python -m tools.make_docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
