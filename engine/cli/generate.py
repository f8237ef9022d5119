"""`dg-run --auto --prompt …`: the main job."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine
from engine import arguments, cards
from engine.cli import options
from engine.errors import HardwareError, UsageError
from engine.plan import Plan
from engine.run.generate import MAX_SEED
from engine.units import format_size
from engine.values import Note, Request
from engine.words import listing

if TYPE_CHECKING:
    from engine.run.progress import Progress

_TRIES = 3

EXAMPLES = """\
examples:
  dg-run --auto --prompt "a red circle on a blue background"
  dg-run --auto --model black-forest-labs/FLUX.1-schnell --prompt "a lighthouse at dusk" --output lighthouse.png
  dg-run --prompt "a lighthouse at dusk" --model DIR --torch_dtype bfloat16 --enable_cpu_offload

commands:
"""


def parser() -> options.Parser:
    """Return the parser of the main job."""
    commands = "\n".join(f"  dg-run {name:<10}{about}" for name, about in options.COMMANDS.items())
    made = options.Parser(
        "dg-run",
        "Draw a picture with a diffusion model on the GPU that is there (or the CPU).",
        usage='dg-run --auto --prompt "…" [options]',
        epilog=f"{EXAMPLES}{commands}\n\nAn option is written with underscores or hyphens, as you like.",
    )
    options.add_job(made)
    options.add_request(made)
    made.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="run a locked plan, exactly (`dg-run plan --lock FILE`); only --prompt, --seed and --output go with it",
    )
    made.add_argument("--force", action="store_true", help="run a list that is not expected to fit all the same")
    made.add_argument("--debug", action="store_true", help="show the libraries' own notices, and tracebacks")
    made.add_argument("--version", action="version", version=f"dg-run {engine.__version__}")
    return made


def run(argv: list[str]) -> int:
    """Plan, check the output's place, load, apply, generate, write. Returns the exit code."""
    made = parser()
    if not argv:
        made.print_help(sys.stderr)
        return UsageError.exit_code
    given = made.read(argv)
    if given.prompt is None or not given.prompt.strip():
        what = "there is no --prompt" if given.prompt is None else "the prompt is empty"
        raise UsageError(what, do='say what to draw: --prompt "a red circle on a blue background"')
    if given.seed is not None and not 0 <= given.seed <= MAX_SEED:
        raise UsageError(f"the seed is {given.seed}", f"it must lie between 0 and {MAX_SEED}")
    if given.plan is not None:
        return _locked(given)
    guide = options.constraints(given) if given.auto else options.exact(given)
    wanted = options.request(given)
    if given.auto and given.force:
        raise UsageError("--force is for a list of your own", "with --auto only what fits is chosen", "leave one out")

    if wanted["gpu"] is not None or wanted["vram"] is not None:
        _refuse_imagined(wanted)

    def planned() -> Plan:
        plan = engine.resolve(**wanted, **guide, prompts_known=True, told=_tell)
        if plan.fits is False and not given.force:
            plan = engine.advise(plan, _tell)  # for the error that follows
        return _forced(plan) if given.force else plan

    return _draw(planned, given.prompt, given.seed, given.output, debug=given.debug)


def _locked(given: argparse.Namespace) -> int:
    """Run a locked plan. Raises: FileError, and where it does not stand on this machine."""
    options.alone(given, "plan", ("prompt", "seed", "output", "debug"), "a locked plan is run exactly as it is")
    lock = engine.read_lock(given.plan)

    def planned() -> Plan:
        return lock.plan(told=_tell)

    return _draw(planned, given.prompt, given.seed, given.output, debug=given.debug)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _forced(plan: Plan) -> Plan:
    """Return a plan that runs although it is not expected to fit."""
    if plan.fits is not False:
        return plan
    because = f"it is not expected to fit, and runs since you insist: {plan.rejected[0].because}"
    note = Note(kind="forced", optimizer=None, because=because)
    return dataclasses.replace(plan, fits=None, rejected=(), notes=(*plan.notes, note))


def _draw(planned: Callable[[], Plan], prompt: str, seed: int | None, place: Path | None, *, debug: bool) -> int:
    from engine.run import generate, load, output
    from engine.run.progress import OnStderr

    told = OnStderr()
    plan = planned()
    load.refuse_unfit(plan)
    seed = generate.new_seed() if seed is None else seed
    paths = output.paths(place, plan.request.batch, seed)
    output.check(paths, plan.request.pixels)
    if unknown := _unknown_words(plan, prompt):
        told.say(
            "note: the embedded model draws coloured circles, squares and triangles; it does not\n"
            f"      know {listing(unknown)}. For anything else name a model: --model OWNER/MODEL or --model DIR"
        )
    plan, made = _ready(planned, plan, prompt, seed, told, debug=debug)
    for picture, path in zip(generate.pictures(plan, made, [prompt], seed, told), paths, strict=True):
        output.save(picture, path, plan)
        told.say(f"seed {picture.info['seed']}, plan {plan.digest[:14]}")
        print(path)
    if (peak := generate.peak_bytes(plan, made)) is not None:
        predicted = plan.estimate.peak_allocated_bytes
        beside = "none was predicted" if predicted is None else f"predicted {format_size(predicted)}"
        told.say(f"measured peak {format_size(peak)} allocated, {beside}")
    return 0


def _ready(
    planned: Callable[[], Plan], plan: Plan, prompt: str, seed: int, told: Progress, *, debug: bool
) -> tuple[Plan, Any]:
    """Return the plan and what draws: what is free is read again, and taken, while other starts on the card wait."""
    from engine.run import generate, lock

    for _ in range(_TRIES):
        with lock.held(plan.card, told.say):
            again = planned()
            if again.device == plan.device:
                told.say(f"plan\n{again.explain()}")
                return again, generate.ready(again, [prompt], seed, told, debug=debug)
        plan = again
    raise HardwareError(
        "the cards change faster than a plan can be made", "each probe preferred another one", "name one: --gpu INDEX"
    )


def _refuse_imagined(wanted: Mapping[str, Any]) -> None:
    """Refuse a card that is not here, before anything is planned for it. Raises: UsageError, HardwareError."""
    asked = Request(
        model="",
        device=wanted["device"],
        gpu=wanted["gpu"],
        vram_bytes=arguments.size("vram", wanted["vram"]),
        host_ram_bytes=arguments.size("host_ram", wanted["host_ram"]),
    )
    imagined = [g for g in cards.snapshot(asked, None).gpus if g.hypothetical]
    if imagined:
        raise UsageError(
            f"the plan is for a card that is not here ({imagined[0].name})",
            "--vram beyond what is free, and names of other cards, are for `dg-run plan`",
            "leave --gpu and --vram out, or ask `dg-run plan` the same",
        )


def _unknown_words(plan: Plan, prompt: str) -> list[str]:
    from engine import facts

    known = facts.find(plan.request.model).vocabulary if plan.request.model == "embedded" else None
    if known is None:
        return []
    words = ("".join(c if c.isalnum() else " " for c in prompt)).split()
    return [repr(w) for w in dict.fromkeys(words) if w.lower() not in known][:5]
