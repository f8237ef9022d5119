"""`dg-run show FILE`: what an output was made with."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from engine import optimizers
from engine.cli import options
from engine.units import format_seconds, format_size
from engine.words import listing, printable

if TYPE_CHECKING:
    from engine.run.like import Found

EXAMPLES = """\
examples:
  dg-run show lighthouse.png
  dg-run --like lighthouse.png              # make it again
  dg-run --like lighthouse.png --seed 8     # and another one like it
"""


def parser() -> options.Parser:
    """Return the parser of `dg-run show`."""
    made = options.Parser(
        "dg-run show", "Show what an output of dg-run was made with.", usage="dg-run show FILE", epilog=EXAMPLES
    )
    made.add_argument("file", type=Path, metavar="FILE", help="a picture or a video that dg-run made")
    made.add_argument("--json", action="store_true", help="print it as JSON")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(argv: list[str]) -> int:
    """Print what a file says of itself. Returns the exit code."""
    given = parser().read(argv)
    from engine.run import like

    found = like.read(given.file)
    print(_json(found) if given.json else _text(given.file, found))
    return 0


def _json(found: Found) -> str:
    prompt = {k: v for k, v in dataclasses.asdict(found.prompt).items() if k != "num_images"}
    said = {"prompt": prompt.pop("text"), **prompt, "image": found.image, "plan": json.loads(found.plan.to_json())}
    return json.dumps(said, indent=2, ensure_ascii=False)


def _text(path: Path, found: Found) -> str:
    plan, asked, guessed = found.plan, found.plan.request, found.plan.estimate
    sizes = [
        None if asked.height is None else f"{asked.width} x {asked.height}",
        None if asked.frames is None else f"{asked.frames} frames",
        None if asked.steps is None else "1 step" if asked.steps == 1 else f"{asked.steps} steps",
        None if asked.guidance is None else f"guidance {asked.guidance:g}",
        *(f"{k}={v}" for k, v in asked.call.items() if k not in ("negative_prompt", "image")),
    ]
    card = plan.card
    profile = "a list of its own" if plan.profile is None else f"{plan.profile.name} {plan.profile.version}"
    peak, seconds = guessed.peak_allocated_bytes, guessed.seconds
    predicted = [
        None if peak is None else f"{format_size(peak)} allocated on the card",
        None if seconds is None else format_seconds(seconds),
    ]
    negative = found.prompt.negative_prompt or asked.call.get("negative_prompt")
    lines = {
        "prompt": found.prompt.text,
        "not": negative,
        "image": found.image and f"sha256:{found.image[:12]}",
        "seed": str(found.prompt.seed),
        "model": asked.model + (f" at {asked.revision}" if asked.revision else ""),
        "LoRA": listing(f"{Path(lora.path).name} at {lora.weight:g}" for lora in asked.loras),
        "size": ", ".join(filter(None, sizes)),
        "plan": f"{plan.digest[:14]}, profile {profile}",
        "optimizers": "; ".join(map(optimizers.short, plan.optimizers)),
        "card": "none (CPU)" if card is None else card.name,
        "predicted": ", ".join(filter(None, predicted)) or None,
        "versions": ", ".join(f"{n} {v}" for n, v in plan.versions.items() if v is not None),
    }
    told = [f"{path}"] + [_row(name, text) for name, text in lines.items() if text]
    beside = " --image FILE" if found.image else ""
    return printable("\n".join([*told, "", f"make it again: dg-run --like {shlex.quote(str(path))}{beside}"]))


def _row(name: str, text: str) -> str:
    return f"  {name:<11}" + f"\n{'':<13}".join(text.splitlines())
