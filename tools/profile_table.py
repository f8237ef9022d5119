"""Write the table of docs/profiles.md that says which models fit which built-in profile, and how; `--check` compares.

python -m tools.profile_table [--check]

Every cell is solved for: the profile by its name (so with its fallbacks), at the least free VRAM that it asks for, on a
machine that is usual otherwise. It makes dry runs at sizes that no trace is shipped for: some minutes the first time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import engine
from engine import optimizers, profiles
from engine.plan import Plan
from engine.units import format_seconds, format_size
from engine.values import Hardware, Host

PAGE = Path(__file__).parents[1] / "docs" / "profiles.md"
BEGIN, END = "<!-- fits: begin, by tools/profile_table.py -->", "<!-- fits: end -->"
CARD, HOST_GIB = "RTX 4090", 64
MODELS = {
    "FLUX.1-dev": "black-forest-labs/FLUX.1-dev",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "SD3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "Wan2.1-1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Qwen-Image": "Qwen/Qwen-Image",
}
NAMES = ("extreme-low", "low", "medium", "hi-res")
VIDEOS = ("Wan2.1-1.3B",)


def _told(plan: Plan) -> str:
    if plan.fits is not True:
        return "does not fit"
    idle = {n.optimizer for n in plan.notes if n.kind == "no_effect"}
    steps = [s for s in plan.optimizers if s.name not in idle and s.name not in ("dtype", "vae_slicing")]
    taken = plan.estimate
    assert plan.profile is not None
    assert taken.seconds is not None
    by = "" if plan.profile.name == plan.request.profile else f" (as {plan.profile.name})"
    run = " + ".join(optimizers.short(s) for s in steps)
    return f"{run}{by}: {format_size(taken.required_bytes or 0)}, {format_seconds(taken.seconds)}"


def table() -> str:
    """Return the table as markdown."""
    gib = 1024**3
    host = Host(ram_bytes=HOST_GIB * gib, total_ram_bytes=HOST_GIB * gib, cores=8, platform="linux")
    lines = [f"| model | {' | '.join(NAMES)} |", "| --- " * (len(NAMES) + 1) + "|"]
    for label, model in MODELS.items():
        cells = []
        for name in NAMES:
            if name == "hi-res" and label in VIDEOS:
                cells.append("no video has frames of four megapixels")
                continue
            side = 2048 if name == "hi-res" else None
            plan = engine.resolve(
                model,
                gpu=CARD,
                vram=profiles.find(name).match.free_vram_at_least_bytes,
                profile=name,
                prompts_known=True,
                hardware=Hardware(gpus=(), host=host, no_gpu_because="planned for a card by its name"),
                height=side,
                width=side,
            )
            cells.append(_told(plan))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if not parser.parse_args().check:
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    if wanted != text:
        print("docs/profiles.md is stale: run `python -m tools.profile_table`", file=sys.stderr)
    return int(wanted != text)


if __name__ == "__main__":
    sys.exit(main())
