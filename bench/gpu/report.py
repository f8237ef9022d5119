"""The report: what was measured, beside what was predicted, as Markdown. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu import compare
from bench.gpu.compare import Point, Run, Trial
from bench.gpu.journal import is_same
from bench.gpu.recipes import RECIPES
from engine.estimate import workspaces
from engine.estimate.trace import Work
from engine.units import GIB, format_size

_GIGA = 1e9
_TITLES = {
    "tensors": ("Tensors alone, as predicted and as counted", "GiB", GIB),
    "allocated": ("Allocated bytes: `max_memory_allocated()`", "GiB", GIB),
    "reserved": ("Reserved bytes: `max_memory_reserved()`", "GiB", GIB),
    "device": ("Device bytes: NVML, the context included", "GiB", GIB),
    "host": ("The host's memory: the process's largest resident set", "GiB", GIB),
    "pinned": ("Pinned bytes, as the pinning allocator rounds them", "GiB", GIB),
    "seconds": ("Seconds of a call, of the steps that were run", "s", 1.0),
}
_HOST = (
    "Measured is what was resident at its most, some 0.25 GiB of libraries' files with it, less what the C library kept"
    " of freed memory where that was looked at: weights come from no file here, and once one of less than 32 MiB has"
    " gone to the card its memory stays with the process. Nothing is predicted of that."
)
_DRY = (
    "> **Dry mode: this is no measurement of a GPU.** A device on the CPU counted the bytes of tensors, and nothing",
    "> else; predictions are for a card that is not here. It shows that the ways work: no figure below says anything",
    "> of a card, and the seconds are a CPU's.",
    "",
)


def page(records: Sequence[dict[str, Any]], *, anew: bool = False, brief: bool = False) -> str:
    """Return the report of some records, a part for each machine. `anew` predicts with this dg-run.

    `brief` leaves out what is no prediction of a run, and single phases.
    """
    lines = ["# Measured on GPUs", ""]
    if not records:
        lines += ["Nothing has been measured.", ""]
    for machine, own in _by_machine(records):
        lines += _machine_part(machine, compare.runs(own, anew=anew), anew, brief)
    return "\n".join(lines)


def _by_machine(records: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    found: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for record in records:
        own = next((o for m, o in found if is_same(m, record["machine"])), None)
        if own is None:
            found.append((record["machine"], [record]))
        else:
            own.append(record)
    return found


def _machine_part(machine: dict[str, Any], runs: list[Run], anew: bool, brief: bool) -> list[str]:
    used = ", ".join(f"{n} {v}" for n, v in machine["versions"].items())
    revisions = ", ".join(sorted({str(r.record["machine"].get("revision")) for r in runs}))
    counts = {s: sum(r.status == s for r in runs) for s in dict.fromkeys(r.status for r in runs)}
    return [
        f"## {machine['card']}",
        "",
        *(_DRY if machine["device"] != "cuda" else ()),
        f"Driver {machine['driver']}; {used}.",
        f"{len(runs)} cases: {', '.join(f'{n} {s}' for s, n in counts.items())}. dg-run was at {revisions};"
        + (" predictions are of the dg-run that made this report." if anew else " predictions are of then.")
        + _calibrated(runs),
        "",
        *_predicted(runs),
        *(() if brief else _phases(runs)),
        *_required(runs),
        *(() if brief else (*_regret(runs), *_field(runs), *_libraries(runs))),
        *_rest(runs),
    ]


def _calibrated(runs: list[Run]) -> str:
    count = sum(r.estimate.calibrated for r in runs)
    return f" {count} predictions rest on a calibration of this machine." if count else ""


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.4f}" if size < GIB else f"{size / GIB:.3f}"


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    marks = ["---" if i < left else "---:" for i in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)] + [""]


def _predicted(runs: list[Run]) -> list[str]:
    lines = ["### Predicted and measured", ""]
    found = compare.points(runs)
    if not found:
        return [*lines, "No exact list was measured.", ""]
    lines += [
        "Memory is that of a fresh process's first call, seconds those of its second. The error is predicted by",
        "measured, less 1.",
        "",
    ]
    for of, (title, name, unit) in _TITLES.items():
        if of in found:
            told = [_HOST, ""] if of == "host" else []
            lines += [f"#### {title}", "", f"{_summed(found[of])}.", "", *told, *_points(found[of], name, unit)]
    return lines


def _summed(of: Sequence[Point]) -> str:
    s = compare.summary(of)
    equal = f", {s.equal} of them equal to the byte" if s.equal else ""
    inside = f"; {s.inside} of {s.judged} inside their interval" if s.judged else ""
    return (
        f"{s.count} points{equal}: median error {s.median:.2%}, 95th percentile {s.p95:.2%},"
        f" {s.too_low} predicted more than 3 % too low{inside}"
    )


def _error(predicted: float, measured: float) -> str:
    return "equal" if predicted == measured else f"{predicted / measured - 1:+.2%}"


def _points(of: Sequence[Point], name: str, unit: float) -> list[str]:
    def row(p: Point) -> list[str]:
        span = "" if p.low is None or p.high is None else f"{p.low / unit:.3f} to {p.high / unit:.3f}"
        return [p.name, f"{p.predicted / unit:.4f}", f"{p.measured / unit:.4f}", _error(p.predicted, p.measured), span]

    return _table(["case", f"predicted {name}", f"measured {name}", "error", "interval"], map(row, of))


def _phases(runs: list[Run]) -> list[str]:
    rows = [
        [
            r.run,
            r.name,
            _gib(r.predicted_bytes),
            _gib(r.measured_bytes),
            "" if not r.predicted_bytes or not r.measured_bytes else _error(r.predicted_bytes, r.measured_bytes),
            _s(None if r.predicted is None else r.predicted.seconds),
            _s(r.first_s),
            _s(r.last_s),
        ]
        for r in compare.phase_rows(runs)
    ]
    if not rows:
        return []
    head = ["case", "phase", "predicted GiB", "measured GiB", "error", "predicted s", "first call s", "second call s"]
    return ["### Phase by phase", "", *_table(head, rows, left=2)]


def _required(runs: list[Run]) -> list[str]:
    found = compare.trials(runs)
    if not found:
        return []
    lines = ["### On a card of what is required", ""]
    for t in found:
        later = f", {len(t.full_later)} in a later call" if t.full_later else ""
        lines.append(f"- At required {t.margin:+.1%}: {len(t.full)} of {t.tried} ran out of memory{later}{_named(t)}")
    return [*lines, ""]


def _named(trial: Trial) -> str:
    told = [*trial.full, *(f"{name} (a later call)" for name in trial.full_later)]
    told += [f"{name} (it died)" for name in trial.died]
    return f": {', '.join(told)}." if told else "."


def _regret(runs: list[Run]) -> list[str]:
    found = compare.regrets(runs)
    if not found:
        return []
    lines = [
        "### What was chosen, and the best that was measured",
        "",
        "Regret is how much longer the choice takes than the fastest measured list that fits the emulated card; lossy",
        "ones stand aside. Seconds are scaled to the model's own number of steps.",
        "",
    ]
    rows = []
    for r in found:
        share = "" if r.share is None else f"{r.share:+.1%}"
        best = ("", "") if r.best is None else (r.best.how, _s(r.best.whole_seconds))
        rows.append([" ".join(r.what), format_size(r.budget_bytes), r.chosen.how, _outcome(r.chosen), *best, share])
    judged = sorted(r.share for r in found if r.share is not None)
    if judged:
        lines += [f"{len(judged)} choices: median regret {statistics.median(judged):.1%}, worst {judged[-1]:.1%}.", ""]
    head = ["request", "card", "chosen", "s", "best", "s", "regret"]
    return [*lines, *_table(head, rows, left=3)]


def _outcome(run: Run | None) -> str:
    """Return the seconds of a run, or in a word why there are none."""
    if run is None:
        return ""
    if run.is_measured:
        return _s(run.whole_seconds)
    if run.status == "skipped":
        return "not installed" if "not installed" in (run.record["because"] or "") else "skipped"
    return {"oom": "**OOM**", "refused": "nothing fits"}.get(run.status, run.status)


def _field(runs: list[Run]) -> list[str]:
    found = compare.contests(runs)
    if not found:
        return []
    names = [n for n in RECIPES if any(n in c.recipes for c in found)]
    rows = [
        [
            " ".join(c.what),
            format_size(c.budget_bytes),
            _outcome(c.chosen),
            *(_outcome(c.recipes.get(n)) for n in names),
        ]
        for c in found
    ]
    return [
        "### Beside others' recipes",
        "",
        "Seconds of a whole run on the same emulated card.",
        "",
        *(f"- `{n}`: {RECIPES[n].about}" + _quality(RECIPES[n].quality) for n in names),
        "",
        *_table(["request", "card", "dg-run", *names], rows, left=2),
    ]


def _quality(quality: str) -> str:
    return "" if quality == "exact" else f" ({quality}: it changes the picture)"


def _libraries(runs: list[Run]) -> list[str]:
    by = {(r.case.part, r.case.name): r for r in runs if r.case.kind == "machine" and r.is_measured}
    lines: list[str] = []
    for (part, name), run in by.items():
        made = {"context": _context, "copies": _copies, "convolutions": _convolutions, "attention": _attentions}
        made |= {"edges": _convolutions}
        if part in made:
            title = {"context": "The CUDA context", "copies": "Copies", "edges": "Workspaces at the edges"}
            title |= {"convolutions": "Workspaces of convolutions"}
            of = f": {name}" if name else ""
            lines += [f"### {title.get(part, 'Attention backends')}{of}", "", *made[part](run)]
    return lines


def _context(run: Run) -> list[str]:
    before = run.measured["before"]["card_bytes"]

    def held(stage: dict[str, Any]) -> int | None:
        """What the process holds beside what its allocator has reserved."""
        if stage["process_bytes"] is not None:
            return int(stage["process_bytes"] - stage["reserved_bytes"])
        if stage["card_bytes"] is not None and before is not None:
            return int(stage["card_bytes"] - before - stage["reserved_bytes"])
        return None

    rows = [[s["after"], _gib(held(s)), format_size(max(0, s["kept_bytes"]))] for s in run.measured["context"]]
    said = "" if run.context_bytes is None else f"Predicted: {_gib(run.context_bytes)} GiB."
    return [*([said, ""] if said else []), *_table(["after", "context GiB", "kept by the allocator"], rows)]


def _copies(run: Run) -> list[str]:
    rows = []
    for c in run.measured["copies"]:
        pinned = {True: "pinned", False: "pageable", None: ""}[c["pinned"]]
        if "because" in c:
            rows.append([format_size(c["bytes"]), pinned, "", c["because"], ""])
        else:
            rows.append(
                [
                    format_size(c["bytes"]),
                    pinned,
                    c["way"],
                    f"{c['bytes_per_s'] / _GIGA:.2f}",
                    f"{c['seconds'] * 1e6:.0f}",
                ]
            )
    return _table(["size", "host memory", "way", "GB/s", "µs a copy"], rows, left=3)


def _convolutions(run: Run) -> list[str]:
    rows = [
        [
            _work(c["work"]),
            _mib(_workspace_bytes(run, c)),
            c.get("because") or _mib(c["bytes"]),
            "" if "because" in c else f"{c['seconds'] * 1e3:.3f}",
            ", ".join(f"`{k[:60]}`" for k in c.get("kernels") or ()),
        ]
        for c in run.measured["convolutions"]
    ]
    head = ["batch, channels in, out, groups; sizes", "predicted MiB", "measured MiB", "ms", "kernels"]
    return _table(head, rows)


def _workspace_bytes(run: Run, measured: dict[str, Any]) -> int | None:
    """Return what this dg-run says of a convolution's workspace, where it is known for which capability."""
    work, capability = measured["work"], run.capability
    if capability is None:
        return None if measured["predicted_bytes"] is None else int(measured["predicted_bytes"])
    return workspaces.taken(Work("conv", work["dtype"], tuple(work["dims"]), work["moved_bytes"]), capability).bytes


def _attentions(run: Run) -> list[str]:
    rows = []
    for a in run.measured["attentions"]:
        for name, got in a["backends"].items():
            if "because" in got:
                rows.append([_work(a["work"]), name, "", "", got["because"][:100]])
            else:
                rows.append([_work(a["work"]), name, _mib(got["bytes"]), f"{got['seconds'] * 1e3:.3f}", ""])
    return _table(["batch, heads, queries, keys, width", "backend", "MiB beside", "ms", "does not run"], rows, left=2)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 1024**2:.1f}"


def _work(work: dict[str, Any]) -> str:
    dims = work["dims"]
    if work["kind"] == "attention":
        return f"{', '.join(map(str, dims[:5]))} {work['dtype']}"
    per = (len(dims) - 5) // 5
    sizes = "x".join(map(str, dims[5 : 5 + per]))
    kernel = "x".join(map(str, dims[5 + per : 5 + 2 * per]))
    return f"{', '.join(map(str, dims[:4]))}; {sizes}, kernel {kernel} {work['dtype']}"


def _rest(runs: list[Run]) -> list[str]:
    lines: list[str] = []
    for title, of in (
        ("Out of memory on the whole card", [r for r in runs if r.status == "oom" and r.case.kind == "exact"]),
        ("Died", [r for r in runs if r.status in ("failed", "timeout", "killed")]),
        ("Not run", [r for r in runs if r.status == "skipped"]),
    ):
        if of:
            lines += [f"### {title}", "", *(f"- {r.id}: {r.status}: {_because(r)}" for r in of), ""]
    return lines


def _because(run: Run) -> str:
    where = f" in {run.record['phase']}" if run.record.get("phase") else ""
    return " ".join(f"{run.record['because']}{where}".split())[:300]
