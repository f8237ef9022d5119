"""docs/accuracy.md: page.md, with what was executed and published, and predictions made anew, in its places."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import engine
from bench.accuracy import executed, published
from bench.accuracy.executed import Case
from bench.accuracy.published import Point
from bench.gpu import compare, journal, report
from engine.estimate.whole import MARGIN
from engine.units import GIB

PATH = Path(__file__).parents[2] / "docs" / "accuracy.md"
_TEMPLATE = Path(__file__).parent / "page.md"
_GPU_RESULTS = Path(__file__).parents[1] / "gpu" / "results"


def made(peaks: Sequence[Point], seconds: Sequence[Point]) -> str:
    """Return the page."""
    records, counted = executed.phantom(), executed.counted()
    cases = executed.cases(records)
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    versions = engine.resolve(device="cpu").versions
    filled = template.substitute(
        torch=_plain(versions["torch"]),
        diffusers=_plain(versions["diffusers"]),
        margin=f"{MARGIN:.1%}",
        gpus=_gpus(),
        intervals="\n".join(_intervals(counted, cases, peaks, seconds)),
        **_counted(counted),
        **_phantom(records, cases),
        **_published(peaks, seconds),
    )
    # Where there is nothing to say a place leaves an empty line too many.
    while "\n\n\n" in filled:
        filled = filled.replace("\n\n\n", "\n\n")
    return filled


def _plain(version: Any) -> str:
    """Return a version without what a build calls itself."""
    return str(version).partition("+")[0]


def _table(*columns: str, rows: Iterable[Sequence[str]], texts: int) -> str:
    """Return a table whose first columns are texts, the others numbers."""
    marks = ["---"] * texts + ["---:"] * (len(columns) - texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, marks, *rows))


def _counted(found: dict[str, Any]) -> dict[str, str]:
    def table(title: str, groups: dict[str, Any]) -> str:
        rows = [
            (n, f"{f['cases']}", f"{f['equal']}", f"{f['worst_error']:.3%}", f"{f['worst_phase_error']:.3%}")
            for n, f in groups.items()
        ]
        return _table(title, "runs", "equal", "largest error of a peak", "of a phase", rows=rows, texts=1)

    whole, staged, different = found["all"], found["staged"], found["different"]
    tables = table("architecture", found["by_architecture"]), table("placement", found["by_placement"])
    listed = [f"- {r['id']}: {'; '.join(r['differences'])}" for r in different]
    return {
        "counted_versions": ", ".join(f"{n} {_plain(v)}" for n, v in found["versions"].items()),
        "counted_cases": f"{whole['cases']:,}",
        "counted_architectures": str(len(found["by_architecture"])),
        "counted_random": f"{found['random_cases']:,}",
        "counted_equal": f"{whole['equal']:,}",
        "counted_worst": f"{whole['worst_error']:.3%}",
        "counted_worst_phase": f"{whole['worst_phase_error']:.3%}",
        "staged_cases": str(staged["cases"]),
        "staged_worst": "equal in all" if staged["worst_error"] == 0 else f"off by {staged['worst_error']:.3%} at most",
        "staged_worst_phase": f"{staged['worst_phase_error']:.1%}",
        "counted_tables": "\n\n".join(tables),
        "counted_different": "\n".join(["Not equal:", "", *listed] if listed else []),
    }


def _phantom(records: Sequence[dict[str, Any]], cases: Sequence[Case]) -> dict[str, str]:
    ran = [c for c in cases if c.because is None]
    full = [c for c in ran if c.kind == "catalogue"]
    different = [
        f"- {c.name}, {c.how}, {c.card}: {_share(c.error)}, of reserved bytes {_share(c.reserved_error)}"
        for c in ran
        if c.kind != "catalogue" and not c.is_equal
    ]
    failed = [f"- {c.name}, {c.how}: {c.because}" for c in cases if c.because is not None]
    rows = [
        (
            c.name,
            f"{c.how}, {c.card}",
            f"{c.executed_bytes / GIB:.3f}",
            f"{c.predicted_bytes / GIB:.3f}",
            _share(c.error),
            _share(c.reserved_error),
        )
        for c in full
    ]
    columns = "model of the catalogue", "how", "executed GiB", "predicted GiB", "error", "of reserved"
    return {
        "phantom_versions": "; ".join(
            sorted({", ".join(f"{n} {v}" for n, v in r["versions"].items()) for r in records})
        ),
        "phantom_cards": ", ".join(sorted({r["card"] for r in records})),
        "phantom_allocator": "\n\n".join(_allocator(r) for r in records if r["kind"] == "allocator"),
        "phantom_catalogue": executed.figures(full),
        "phantom_small": executed.figures([c for c in ran if c.kind != "catalogue"]),
        "phantom_different": "\n".join(["Small pipelines that are not equal:", "", *different] if different else []),
        "phantom_table": _table(*columns, rows=rows, texts=2),
        "phantom_failed": "\n".join(["Not compared:", "", *failed] if failed else []),
    }


def _allocator(record: dict[str, Any]) -> str:
    alike = record["runs"] - len(record["unlike"])
    streams, runs, short = record["streams"], record["runs"], record["out_of_memory"]
    return (
        f"The allocator alone: {streams:,} random streams of requests, each without a limit and under three: {runs:,}"
        f" runs, of which {short:,} run out of memory. In {alike:,} of them torch's allocator and ours agree in"
        " allocated and reserved bytes, and in the request at which memory runs out."
    )


def _share(error: float) -> str:
    return "equal" if error == 0 else f"{error:+.3%}"


def _published(peaks: Sequence[Point], seconds: Sequence[Point]) -> dict[str, str]:
    resident = [p for p in seconds if p.placement == "resident"]
    ratios = [max(p.predicted / p.published, p.published / p.predicted) for p in resident]
    return {
        "peaks_summary": published.summary(peaks),
        "peaks_table": _points(peaks, GIB, "GiB"),
        "seconds_summary": published.summary(seconds),
        "seconds_ratio": f"{statistics.median(ratios):.2f}",
        "seconds_table": _points(seconds, 1.0, "s"),
        "explanations": "\n".join(f"- **{i}**: {text}" for i, text in published.explanations().items()),
        "sources": "\n".join(f"- {s}" for s in sorted({p.source for p in (*peaks, *seconds)})),
    }


def _points(points: Sequence[Point], unit: float, name: str) -> str:
    rows = [
        (
            f"{p.what} ({p.id})",
            "" if p.low is None or p.high is None else f"{p.low / unit:.2f} to {p.high / unit:.2f}",
            f"{p.published / unit:.3f}",
            f"{p.predicted / unit:.3f}",
            f"{p.error:+.2%}",
        )
        for p in points
    ]
    return _table("point", f"interval, {name}", f"published {name}", f"predicted {name}", "error", rows=rows, texts=2)


def _gpu_runs() -> list[compare.Run]:
    """Return the runs on GPUs of ours, as predicted now."""
    return compare.runs((r for f in sorted(_GPU_RESULTS.glob("*.jsonl")) for r in journal.read(f)), anew=True)


def _gpus() -> str:
    files = sorted(_GPU_RESULTS.glob("*.jsonl"))
    if not files:
        return (
            "None yet: no GPU was at hand. `python -m bench.gpu run` measures on one, and its results go to"
            " `bench/gpu/results/`, from where they come onto this page."
        )
    records = [r for f in files for r in journal.read(f)]
    # The report's own headings become one level lower.
    body = report.page(records, anew=True, brief=True).splitlines()[1:]
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in body).strip()


def _intervals(
    counted: dict[str, Any], cases: Sequence[Case], peaks: Sequence[Point], seconds: Sequence[Point]
) -> Iterable[str]:
    runs = counted["all"]["cases"]
    ran = [c for c in cases if c.because is None]
    judged = [p for p in peaks if p.low is not None]
    found = {
        f"counted device, bytes of tensors (within {MARGIN:.1%})": (
            runs,
            runs - sum(abs(r["error"]) > MARGIN for r in counted["different"]),
        ),
        f"torch's CUDA build without a card, allocated bytes (within {MARGIN:.1%})": (
            len(ran),
            sum(abs(c.error) <= MARGIN for c in ran),
        ),
        "published, allocated bytes": (len(judged), sum(p.is_inside for p in judged)),
        "published, seconds": (len(seconds), sum(p.is_inside for p in seconds)),
    }
    measured = compare.points(_gpu_runs())
    for of, name in (("allocated", "allocated bytes"), ("seconds", "seconds")):
        if of in measured:
            one = compare.summary(measured[of])
            found[f"measured on a GPU, {name}"] = (one.judged, one.inside)
    return (f"| {name} | {count:,} | {inside:,} |" for name, (count, inside) in found.items())
