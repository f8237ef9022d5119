"""The harness's commands: `python -m bench.gpu run | report | list | pack`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import machines, matrix, prefetch, runner
from bench.gpu.forked import Nursery
from bench.gpu.journal import Journal, read
from engine import arguments
from engine.errors import INTERRUPTED_EXIT_CODE, DgRunError, HardwareError, UsageError
from engine.values import Hardware

_DEFAULT_OUT = "gpu-results.jsonl"
_PACKAGES = (
    f"Needs dg-run and {', '.join(machines.NEEDED)}, torch built for CUDA; uses {', '.join(machines.ALSO)} where"
    " they are installed. No network."
)


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, which is dg-run's own for each kind of error."""
    given = _parser().parse_args(words)
    try:
        return int(given.run(given))
    except DgRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("run", help="measure on the card that is here", epilog=_PACKAGES)
    listing = commands.add_parser("list", help="show the cases of a set, in their order")
    for command in (measure, listing):
        command.add_argument(
            "--set", default=None, choices=matrix.sets(), help="which cases (default: quick; dry: dry)"
        )
        command.add_argument("--models", default="", help="only these, by their names in matrix.yaml, with commas")
        command.add_argument("--budgets", default="", help="emulated cards instead of the set's own: 8GiB,12GiB")
        command.add_argument("--only", default="", metavar="TEXT", help="only cases whose ids hold this text")
        command.add_argument("--cases", type=Path, metavar="FILE", help="these ids, one a line, instead of a set")
        command.add_argument("--steps", type=int, help="denoising steps of a call, instead of the matrix's")
        command.add_argument("--dry", action="store_true", help="on the device that counts bytes, without a card")
    measure.add_argument("--out", type=Path, default=Path(_DEFAULT_OUT), help=f"file to add to ({_DEFAULT_OUT})")
    measure.add_argument("--minutes", type=float, default=60.0, help="stop after so long (60)")
    measure.add_argument("--case-minutes", type=float, default=6.0, help="end a case after so long (6)")
    measure.add_argument(
        "--second-under",
        type=float,
        metavar="SECONDS",
        help="call a pipeline a second time only where the first call took less (default: always)",
    )
    measure.add_argument("--host-ram", help="what the host has, as 128GiB, where it shows less than it gives")
    measure.add_argument(
        "--fork",
        action="store_true",
        help="cases are forks of one process that has started no CUDA, which saves each its imports (Linux)",
    )
    measure.add_argument("--gpu", help="index or UUID, where there are several (default: the one with the most free)")
    measure.add_argument(
        "--retry", action="store_true", help="run cases again that failed, were killed or took too long"
    )
    measure.set_defaults(run=_run)
    listing.set_defaults(run=_list)
    told = commands.add_parser("report", help="compare what was measured with what was predicted; needs no torch")
    told.add_argument("files", nargs="+", type=Path, help="files that `run` wrote")
    told.add_argument("--write", type=Path, metavar="FILE.md", help="write the report there instead of printing it")
    told.add_argument("--anew", action="store_true", help="predict anew, with this dg-run, for the recorded cards")
    told.set_defaults(run=_report)
    packed = commands.add_parser("pack", help="write one folder to carry to a machine with a card")
    packed.add_argument("folder", type=Path, help="a new folder")
    packed.add_argument("--wheels", action="store_true", help="download the wheels of what it needs as well")
    packed.add_argument("--index-url", help="where pip takes them from, such as PyTorch's own for a CUDA version")
    packed.set_defaults(run=_pack)
    return made


def _cases(given: argparse.Namespace) -> tuple[matrix.Case, ...]:
    if given.cases is not None:
        return matrix.named(_ids(given.cases))
    name = given.set or ("dry" if given.dry else "quick")
    budgets = [b for b in (arguments.size("--budgets", text) for text in _words(given.budgets)) if b]
    found = matrix.cases(name, models=_words(given.models), budgets_bytes=budgets, steps=given.steps)
    wanted = tuple(c for c in found if given.only in c.id)
    if not wanted:
        raise UsageError(f"no case of {name} has {given.only!r} in its id", do="`list` shows the ids")
    return wanted


def _ids(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{file} cannot be read", error.strerror or str(error), "give a file of ids") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _list(given: argparse.Namespace) -> int:
    for case in _cases(given):
        print(case.id)
    return 0


def _run(given: argparse.Namespace) -> int:
    if not given.minutes > 0 or not given.case_minutes > 0:
        raise UsageError("--minutes and --case-minutes are more than nothing", do="give a number such as 60")
    until = time.monotonic() + given.minutes * 60
    cases = _cases(given)
    machines.refuse_incomplete()
    journal = Journal(given.out)

    def look() -> Hardware:
        return machines.hardware(given.dry, given.gpu, arguments.size("--host-ram", given.host_ram))

    seen = look()
    (card,) = seen.gpus
    uuid = None if given.dry else card.uuid
    nursery = Nursery(uuid) if given.fork else None
    if nursery is not None:
        nursery.start()  # it imports while the card is asked
    try:
        torch_says = runner.greet(given.dry, uuid, asked=None if nursery is None else nursery.ask)
    except HardwareError as error:
        if nursery is None:
            raise
        _say(f"a fork cannot use the card, so that each case is a new process: {error}")
        nursery.close()
        nursery = None
        torch_says = runner.greet(given.dry, uuid)
    machine = machines.described(seen, torch_says)
    print(f"{len(cases)} cases on {machine['card']}, for {given.minutes:g} minutes, into {given.out}", flush=True)
    try:
        with prefetch.outlooks(cases, seen, forks=given.fork) as outlooks:
            left = runner.run(
                cases,
                journal,
                machine,
                look,
                runner.Limits(until=until, case_s=given.case_minutes * 60, second_under_s=given.second_under),
                dry=given.dry,
                retry=given.retry,
                told=_say,
                asked=None if nursery is None else nursery.ask,
                outlooks=outlooks,
            )
    finally:
        if nursery is not None:
            nursery.close()
    if left:
        print(f"time is up: {left} cases are left; the same command goes on from there")
    print(f"next: python -m bench.gpu report {given.out}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _report(given: argparse.Namespace) -> int:
    from bench.gpu import report

    records = [record for file in given.files for record in _existing(file)]
    text = report.page(records, anew=given.anew)
    if given.write is None:
        print(text, end="")
    else:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(text, encoding="utf-8")
    return 0


def _existing(file: Path) -> list[dict[str, object]]:
    if not file.is_file():
        raise UsageError(f"there is no file {file}", do="give a file that `run` wrote")
    return read(file)


def _pack(given: argparse.Namespace) -> int:
    from bench.gpu import pack

    pack.write(given.folder, wheels=given.wheels, index_url=given.index_url)
    print(f"written: {given.folder}; its README.md says what to type there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
