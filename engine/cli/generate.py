"""`dg-run --auto --prompt …`: the main job."""

from __future__ import annotations

import sys
from pathlib import Path

import engine
from engine.cli import options
from engine.errors import HardwareError, UsageError
from engine.plan import Plan
from engine.run.generate import MAX_SEED
from engine.words import listing

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
    made.add_argument("--debug", action="store_true", help="show the libraries' own notices, and tracebacks")
    made.add_argument("--version", action="version", version=f"dg-run {engine.__version__}")
    return made


def run(arguments: list[str]) -> int:
    """Plan, check the output's place, load, apply, generate, write. Returns the exit code."""
    made = parser()
    if not arguments:
        made.print_help(sys.stderr)
        return UsageError.exit_code
    given = made.read(arguments)
    if given.prompt is None or not given.prompt.strip():
        what = "there is no --prompt" if given.prompt is None else "the prompt is empty"
        raise UsageError(what, do='say what to draw: --prompt "a red circle on a blue background"')
    if given.seed is not None and not 0 <= given.seed <= MAX_SEED:
        raise UsageError(f"the seed is {given.seed}", f"it must lie between 0 and {MAX_SEED}")
    plan = engine.resolve(
        **options.request(given), **(options.constraints(given) if given.auto else options.exact(given))
    )
    return _draw(plan, given.prompt, given.seed, given.output, debug=given.debug)


def _draw(plan: Plan, prompt: str, seed: int | None, place: Path | None, *, debug: bool) -> int:
    from engine.run import device, generate, load, output
    from engine.run.progress import OnStderr

    told = OnStderr()
    told.say(f"plan\n{plan.explain()}")
    load.refuse_unfit(plan)
    _refuse_imagined_vram(plan)
    if unknown := _unknown_words(plan, prompt):
        told.say(
            "note: the embedded model draws coloured circles, squares and triangles; it does not\n"
            f"      know {listing(unknown)}. For anything else name a model: --model OWNER/MODEL or --model DIR"
        )
    seed = generate.new_seed() if seed is None else seed
    paths = output.paths(place, plan.request.batch, seed)
    output.check(paths, plan.request.pixels)
    pictures = generate.run(plan, [prompt], seed=seed, told=told, debug=debug)
    for picture, path in zip(pictures, paths, strict=True):
        output.save(picture, path, plan)
        told.say(f"seed {picture.info['seed']}, plan {plan.digest[:14]}")
        print(path)
    if (peak := device.peak_allocated_bytes(plan.torch_device)) is not None:
        from engine.units import format_size

        told.say(f"measured peak {format_size(peak)} allocated (this version predicts none)")
    return 0


def _refuse_imagined_vram(plan: Plan) -> None:
    imagined = [g for g in plan.hardware.gpus if g.hypothetical]
    if imagined:
        raise HardwareError(
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
