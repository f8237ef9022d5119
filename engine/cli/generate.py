"""`dg-run --auto --prompt …`: the main job."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine
from engine import arguments, cards, drift, pictures, prompts
from engine.cli import options
from engine.errors import FileError, UsageError
from engine.pictures import Picture
from engine.plan import Plan
from engine.prompts import Prompt
from engine.units import format_size
from engine.values import Note, Request
from engine.words import listing, printable

if TYPE_CHECKING:
    from engine.run.items import Call
    from engine.run.journal import Journal
    from engine.run.places import Place
    from engine.run.progress import Progress

EXAMPLES = """\
examples:
  dg-run --auto --prompt "a red circle on a blue background"
  dg-run --auto --model black-forest-labs/FLUX.1-schnell --prompt "a lighthouse at dusk" --output lighthouse.png
  dg-run --auto --prompts prompts.txt --num_images 2 --output pictures/
  dg-run --prompt "a lighthouse at dusk" --model DIR --torch_dtype bfloat16 --enable_cpu_offload
  dg-run --auto --image in.png --strength 0.6 --prompt "a green square on a yellow background"
  dg-run --like lighthouse.png --seed 8

commands:
"""


def parser() -> options.Parser:
    """Return the parser of the main job."""
    commands = "\n".join(f"  dg-run {name:<10}{about}" for name, about in options.COMMANDS.items())
    made = options.Parser(
        "dg-run",
        "Draw pictures or videos with a diffusion model on the GPU that is there (or the CPU).",
        usage='dg-run --auto --prompt "…" [options]',
        epilog=f"{EXAMPLES}{commands}\n\nAn option is written with underscores or hyphens, as you like.",
    )
    options.add_job(made)
    options.add_request(made)
    made.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="run a locked plan, exactly (`dg-run plan --lock FILE`); prompts, image, seed and output go with it",
    )
    made.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="make an output again by what is in it; another --prompt, --seed or --output goes with it",
    )
    made.add_argument("--force", action="store_true", help="run a list that is not expected to fit all the same")
    made.add_argument("--debug", action="store_true", help="show the libraries' own notices, and tracebacks")
    made.add_argument("--version", action="version", version=f"dg-run {engine.__version__}")
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a plan is run for."""

    prompts: tuple[Prompt, ...]
    num_images: int | None
    seed: int | None
    output: str | None
    picture: Picture | None
    """What all of them begin with."""
    file: Path | None
    """The file of the prompts: a run of one is numbered into a folder."""
    preview: bool
    debug: bool


_OF_A_JOB = ("prompt", "prompts", "image", "num_images", "seed", "output", "preview", "debug")


def run(argv: list[str]) -> int:
    """Plan, check the outputs' place, load, apply, generate, write. Returns the exit code."""
    made = parser()
    if not argv:
        made.print_help(sys.stderr)
        return UsageError.exit_code
    given = made.read(argv)
    if given.like is not None:
        return _like(given)
    several = _prompts(given)
    if given.plan is not None:
        return _locked(given, _job(given, several, _picture(given)))
    guide = options.constraints(given) if given.auto else options.exact(given)
    wanted = options.request(given)
    image = wanted["call"].get("image")
    job = _job(given, several, image if isinstance(image, Picture) else None)
    if given.auto and given.force:
        raise UsageError("--force is for a list of your own", "with --auto only what fits is chosen", "leave one out")
    if wanted["gpu"] is not None or wanted["vram"] is not None:
        _refuse_imagined(wanted)
    if "negative_prompt" not in wanted["call"] and (negative := _negative(job.prompts)) is not None:
        wanted["call"] = {**wanted["call"], "negative_prompt": negative}  # guidance by it may cost a second pass

    def planned() -> Plan:
        plan = engine.resolve(**wanted, **guide, prompts_known=True, told=_tell)
        if plan.fits is False and not given.force:
            plan = engine.advise(plan, _tell)  # for the error that follows
        return _forced(plan) if given.force else plan

    return _draw(planned, job)


def _prompts(given: argparse.Namespace) -> tuple[Prompt, ...]:
    """Return the prompts of a command line. Raises: UsageError, FileError."""
    if given.prompt is not None and given.prompts is not None:
        raise UsageError("--prompt and --prompts contradict each other", "both say what to draw", "leave one out")
    if given.prompts is not None:
        return prompts.read(given.prompts)
    if given.prompt is None:
        raise UsageError("there is no --prompt", do='say what to draw: --prompt "a red circle on a blue background"')
    return prompts.of(given.prompt)


def _picture(given: argparse.Namespace) -> Picture | None:
    return None if given.image is None else pictures.read(given.image)


def _job(given: argparse.Namespace, several: tuple[Prompt, ...], picture: Picture | None) -> Job:
    prompts.check_seed(given.seed)
    prompts.check_count(given.num_images)
    return Job(
        prompts=several,
        num_images=given.num_images,
        seed=given.seed,
        output=given.output,
        picture=picture,
        file=given.prompts,
        preview=given.preview,
        debug=given.debug,
    )


def _negative(several: Iterable[Prompt]) -> str | None:
    """Return what one of the prompts says should not be drawn."""
    return next((p.negative_prompt for p in several if p.negative_prompt is not None), None)


def _locked(given: argparse.Namespace, job: Job) -> int:
    """Run a locked plan. Raises: FileError, and where it does not stand on this machine."""
    options.alone(given, "plan", _OF_A_JOB, "a locked plan is run exactly as it is")
    lock = engine.read_lock(given.plan)

    def planned() -> Plan:
        return lock.plan(told=_tell)

    return _draw(planned, job)


def _like(given: argparse.Namespace) -> int:
    """Make an output again. Raises: FileError, and where its plan does not stand on this machine."""
    from engine.run import like

    options.alone(given, "like", _OF_A_JOB, "an output is made again by the plan that is in it")
    found = like.read(given.like)
    is_new = given.prompt is not None or given.prompts is not None
    job = _job(given, _prompts(given) if is_new else (found.prompt,), _picture(given))
    if job.picture is not None and job.picture.sha256 != found.image:
        _tell(f"note: {given.like} began with another picture than {given.image}")
    if job.seed is None:
        job = dataclasses.replace(job, seed=found.prompt.seed)
    if not is_new:
        # Beside others in one call it would not be quite the same; and one output is what there is to make.
        own = dataclasses.replace(found.prompt, seed=job.seed)
        job = dataclasses.replace(job, prompts=(own,), num_images=job.num_images or 1)

    def planned() -> Plan:
        held = drift.held(found.lock, told=_tell)
        if held.plan is None or held.refusing:
            error = drift.refusal(held.drift)
            raise type(error)(
                f"{given.like} cannot be made again here",
                error.why,
                "give back what it was made with; or draw with what is here: dg-run --auto, with its prompt and seed",
            )
        return held.plan

    return _draw(planned, job)


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _forced(plan: Plan) -> Plan:
    """Return a plan that runs although it is not expected to fit."""
    if plan.fits is not False:
        return plan
    because = f"it is not expected to fit, and runs since you insist: {plan.rejected[0].because}"
    note = Note(kind="forced", optimizer=None, because=because)
    return dataclasses.replace(plan, fits=None, rejected=(), notes=(*plan.notes, note))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The calls of a run, where their outputs go, and the log there, which knows the job by its name."""

    calls: tuple[Call, ...]
    seed: int
    place: Place
    journal: Journal
    name: str

    @property
    def count(self) -> int:
        return sum(len(c.items) for c in self.calls)


def _draw(planned: Callable[[], Plan], job: Job) -> int:
    from engine.run import calls, load
    from engine.run.progress import OnStderr

    told = OnStderr()
    plan = planned()
    load.refuse_unfit(plan)
    calls.refuse_missing(plan.request, job.picture)
    if job.picture is not None and not any(n.kind == "image" for n in plan.notes):  # a lock's is another picture
        _tell(f"note: {pictures.told(job.picture, plan.request.call['image'])}")
    found = _placed(plan, job, told)
    with found.place.held():
        missing = found.place.missing(plan, found.calls)
        found.place.check(plan, missing)
        if unknown := _unknown_words(plan, job.prompts):
            told.say(
                "note: the embedded model draws coloured circles, squares and triangles; it does not\n"
                f"      know {listing(unknown)}. For anything else name a model: --model OWNER/MODEL or --model DIR"
            )
        if (left := sum(len(c.items) for c in missing)) < found.count:
            told.say(f"{found.count - left} of {found.count} are there already, in {found.place.folder}")
        if missing:
            if found.place.goes_on:
                found.journal.begin(found.name, found.seed, found.count)
            _make(plan, missing, planned, found, told, job)
    return 0


def _make(
    plan: Plan, wanted: Sequence[Call], again: Callable[[], Plan], into: Placed, told: Progress, job: Job
) -> None:
    from engine.run import preview, runner

    def preview_at(call: Call) -> Path:
        return preview.path(into.place.path(call.items[0]))

    peak_bytes = predicted_bytes = fault = None
    shown = preview_at if job.preview else None
    for made in runner.run(plan, wanted, told, again=again, preview_at=shown, debug=job.debug):
        lost: list[FileError] = []
        for item, output in made.each():
            try:
                path = into.place.save(output, item, made.plan, is_broken=made.is_broken(item))
            except FileError as error:  # each of those beside it may be kept yet
                lost.append(error)
                continue
            if path is None:
                continue
            into.journal.add(made, item, path)
            told.say(f"seed {item.seed}, plan {made.plan.digest[:14]}")
            print(path, flush=True)
        if lost:
            raise FileError(lost[0].what, lost[0].why, "\n       ".join(dict.fromkeys(e.do for e in lost)))
        fault = made.fault or fault
        if made.peak_bytes is not None:
            peak_bytes = max(made.peak_bytes, peak_bytes or 0)
            predicted_bytes = made.plan.estimate.peak_allocated_bytes
    if peak_bytes is not None:
        beside = "none was predicted" if predicted_bytes is None else f"predicted {format_size(predicted_bytes)}"
        told.say(f"measured peak {format_size(peak_bytes)} allocated, {beside}")
    if fault is not None:
        raise fault


def _placed(plan: Plan, job: Job, told: Progress) -> Placed:
    """Return the calls of a run and where their outputs go.

    A run into a folder that was begun without a seed goes on with the seed that it had. Raises: UsageError.
    """
    from engine.run import items, output, places
    from engine.run.journal import Journal

    name, folder, seed = items.job(plan.request, job.prompts, job.num_images, job.picture), _folder(job), job.seed
    journal = None if folder is None else Journal(folder, told.say)
    if journal is not None and seed is None and (seed := journal.seed_of(name)) is not None:
        told.say(f"going on with the run in {folder} that began with seed {seed} (another one: --seed)")
    seed = items.new_seed() if seed is None else seed
    calls = items.calls(job.prompts, seed, plan.request.batch, job.num_images, job.picture)
    count, suffix = sum(len(c.items) for c in calls), output.suffix(plan)
    place: Place
    if folder is not None:
        place = places.Folder(folder, count, suffix)
    else:
        place = places.Files(None if job.output is None else Path(job.output), count, calls[0].seeds[0], suffix)
    return Placed(calls=calls, seed=seed, place=place, journal=journal or Journal(place.folder, told.say), name=name)


def _folder(job: Job) -> Path | None:
    """Return the folder that outputs are numbered into: for a file of prompts, or where `--output` is one.

    Raises: UsageError.
    """
    from engine.run.places import FOLDER

    if job.output is None:
        return None if job.file is None else FOLDER / job.file.stem
    where = Path(job.output)
    if where.is_dir() or job.output.endswith(("/", os.sep)):
        return where
    if job.file is not None and where.suffix:
        raise UsageError(
            f"--output {job.output} is one file, and --prompts makes several",
            "the outputs of a file of prompts are numbered into a folder",
            f"give a folder: --output {where.with_suffix('')}/",
        )
    return None if job.file is None else where


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


def _unknown_words(plan: Plan, several: Iterable[Prompt]) -> list[str]:
    from engine import facts

    known = facts.find(plan.request.model).vocabulary if plan.request.model == "embedded" else None
    if known is None:
        return []
    words = ("".join(c if c.isalnum() else " " for p in several for c in f"{p.text} ")).split()
    return [repr(w) for w in dict.fromkeys(words) if w.lower() not in known][:5]
