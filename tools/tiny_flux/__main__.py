"""`python -m tools.tiny_flux build|refine|judge`: train the embedded pipeline, or measure one that is there."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

from tools.tiny_flux import flow, vae
from tools.tiny_flux.draw import generate
from tools.tiny_flux.judge import score
from tools.tiny_flux.scenes import held_out_scenes, held_out_triples, triples
from tools.tiny_flux.text import save_tokenizers

LATENT_COUNT = 24_000
SHIFT = 2.0


def build(out: Path, seed: int, vae_steps: int, flow_steps: int, compile_step: bool) -> None:
    """Train everything from `seed` and write a diffusers folder to `out`."""
    start = time.perf_counter()
    allowed = [t for t in triples() if t not in held_out_triples()]
    clip_tokenizer, t5_tokenizer = save_tokenizers(out)
    autoencoder = vae.train(seed, allowed, vae_steps)
    raw, scenes = vae.encode(autoencoder, LATENT_COUNT, seed + 1, allowed)
    latents = vae.fold_statistics(autoencoder, raw)
    print(f"{len(scenes)} latents after {time.perf_counter() - start:.0f} s", flush=True)
    networks = flow.train(latents, scenes, clip_tokenizer, t5_tokenizer, seed, flow_steps, compile_step)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT, use_dynamic_shifting=False)
    # Halves where a plain `from_pretrained` widens them again (diffusers); transformers would keep halves, and a
    # pipeline of two dtypes does not run, so the 0.7 MB of text encoders stay in single precision.
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder.to(torch.float16),
        text_encoder=networks.clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=networks.t5,
        tokenizer_2=t5_tokenizer,
        transformer=networks.transformer.to(torch.float16),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    # The tokenizers again: one that has been used saves the padding and truncation of its last call.
    save_tokenizers(out)
    make_readable(out)
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)


def make_readable(folder: Path) -> None:
    """Let everybody read the files: weights are saved for their owner only."""
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)


def refine(folder: Path, seed: int, steps: int) -> None:
    """Train the decoder of a built pipeline further, in place."""
    allowed = [t for t in triples() if t not in held_out_triples()]
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae")
    vae.refine(autoencoder, seed, allowed, steps)
    # Without this the configuration would carry the path it was loaded from.
    autoencoder.register_to_config(_name_or_path="")
    autoencoder.to(torch.float16).save_pretrained(folder / "vae")
    make_readable(folder)


def judge_folder(folder: Path, seeds: int, grid: Path | None, tiling: bool) -> None:
    """Print the share of held-out prompts that come out right, and draw the first 32 for a person to look at."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if tiling:
        pipeline.vae.enable_tiling()
    scenes = held_out_scenes()
    pictures: list[np.ndarray] = []
    for seed in range(seeds):
        pictures += generate(pipeline, scenes, seed)
        print(f"seed {seed}:", {k: round(v, 3) for k, v in score(pictures[-len(scenes) :], scenes).items()}, flush=True)
    print(f"all {len(pictures)}:", {k: round(v, 3) for k, v in score(pictures, scenes * seeds).items()})
    if grid is not None:
        picked = [pictures[i * len(scenes) // 32] for i in range(32)]
        rows = [np.concatenate(picked[r * 8 : r * 8 + 8], axis=1) for r in range(4)]
        Image.fromarray(np.concatenate(rows)).save(grid)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_flux", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="train from scratch and write a diffusers folder")
    builder.add_argument("--out", type=Path, required=True)
    builder.add_argument("--seed", type=int, default=0)
    builder.add_argument("--vae-steps", type=int, default=vae.STEPS)
    builder.add_argument("--flow-steps", type=int, default=flow.STEPS)
    builder.add_argument("--no-compile", action="store_true", help="do not use torch.compile (needs a C++ compiler)")
    refiner = commands.add_parser("refine", help="train the decoder of a built folder further, in place")
    refiner.add_argument("folder", type=Path)
    refiner.add_argument("--seed", type=int, default=0)
    refiner.add_argument("--steps", type=int, default=vae.REFINE_STEPS)
    judge = commands.add_parser("judge", help="measure a folder on the held-out prompts")
    judge.add_argument("folder", type=Path)
    judge.add_argument("--seeds", type=int, default=3)
    judge.add_argument("--grid", type=Path, help="write 32 of the pictures here")
    judge.add_argument("--tiling", action="store_true", help="decode in tiles")
    options = parser.parse_args()
    if options.command == "build":
        build(options.out, options.seed, options.vae_steps, options.flow_steps, not options.no_compile)
    elif options.command == "refine":
        refine(options.folder, options.seed, options.steps)
    else:
        judge_folder(options.folder, options.seeds, options.grid, options.tiling)


if __name__ == "__main__":
    main()
