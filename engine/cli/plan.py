"""`dg-run plan`: the plan and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import engine
from engine.cli import options
from engine.errors import NothingFitsError, UsageError


def parser() -> options.Parser:
    """Return the parser of `dg-run plan`."""
    made = options.Parser(
        "dg-run plan",
        "Show what would be run, and why, without loading or downloading anything big.\n"
        "It takes the options of the main job, so that one word turns a command line into its plan;\n"
        "the prompt, the seed and the output decide nothing.",
    )
    made.add_argument("--exact", action="store_true", help="the listed optimizers are the whole list; choose nothing")
    made.add_argument("--json", action="store_true", help="print the plan as JSON (schema/plan.schema.json)")
    made.add_argument(
        "--requests",
        type=Path,
        metavar="FILE.jsonl",
        help="answer many requests, one JSON a line (docs/reference.md); takes no other option",
    )
    made.add_argument(
        "--lock", type=Path, metavar="FILE", help="write the plan as a lock, FILE.yaml or FILE.json (docs/locks.md)"
    )
    made.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="does a lock still fit, and would it be planned so again: 0 yes, 3 otherwise, 4 it does not fit",
    )
    made.add_argument("--timeline", type=Path, metavar="FILE.svg", help="draw the card's memory over the run")
    options.add_job(made)
    options.add_request(made)
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(arguments: list[str]) -> int:
    """Print the plan; 4 when nothing fits."""
    given = parser().read(arguments)
    if given.auto and given.exact:
        why = "one chooses, the other applies exactly the listed flags"
        raise UsageError("--auto and --exact contradict each other", why, "leave one of them out")
    if given.requests is not None:
        options.alone(given, "requests", ("debug",), "each line of the file says all of its request")
        from engine.cli import requests

        return requests.answer_all(given.requests)
    if given.check is not None:
        options.alone(given, "check", ("json", "debug"), "a lock says all of its request, and its card")
        from engine.cli import locks

        return locks.check(given.check, is_json=given.json)
    if given.lock is not None:
        from engine import lockfile

        lockfile.check_place(given.lock)
    if given.timeline is not None:
        from engine.cli import drawing

        drawing.check(given.timeline)
    plan = engine.resolve(
        **options.request(given),
        **(options.exact(given) if given.exact else options.constraints(given)),
        prompts_known=True,  # as the main job, whose plan this is, knows its prompt
        told=_tell,
    )
    from engine import advice, rungs

    plan = rungs.ladder(advice.advise(plan, _tell), _tell)
    if given.lock is not None and plan.fits is not False:
        # Before anything is printed: whoever reads it may not read it to its end.
        plan.lock(given.lock)
        _tell(f"the lock is in {given.lock}")
    print(plan.to_json() if given.json else plan.explain(), flush=True)
    if given.timeline is not None:
        from engine import api, chart
        from engine.cli import drawing

        drawing.write(given.timeline, chart.svg(plan, api.timeline(plan, _tell)))
        _tell(f"the timeline is in {given.timeline}")
    return NothingFitsError.exit_code if plan.fits is False else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
