"""Train the autoencoder: 128 px pictures to latents of 16 x 16 x 8 and back."""

from __future__ import annotations

import math
import random
import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.tiny_flux.scenes import CANVAS_PX, Scene, draw_batch

STEPS = 1900
KL_WEIGHT = 5e-4
KL_WARMUP_STEPS = 400
LEARNING_RATE = 2e-3
CROP_PX = 64
CHANNELS = 8
LATENT_SIDE = 16
REFINE_STEPS = 4000
REFINE_LEARNING_RATE = 1e-3
REFINE_NOISE = 0.35


def untrained() -> AutoencoderKL:
    """Return the architecture.

    One normalisation group: eight groups on eight channels would be instance normalisation and lose the colour.
    `sample_size` is half the canvas, since tiling starts strictly above it.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=CHANNELS,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=CROP_PX,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=True,
        use_post_quant_conv=True,
        force_upcast=False,
    )


def _crop_on_outline(pictures: Tensor, rng: random.Random) -> Tensor:
    """Return one square crop a picture, centred near a pixel where the picture changes: flat colour teaches little."""
    out = []
    for picture in pictures:
        edge = (picture[:, 1:, 1:] - picture[:, :-1, 1:]).abs().sum(0) + (
            picture[:, 1:, 1:] - picture[:, 1:, :-1]
        ).abs().sum(0)
        spots = edge.flatten().nonzero().flatten()
        spot = int(spots[rng.randrange(len(spots))])
        y, x = divmod(spot, CANVAS_PX - 1)
        top = min(max(y - rng.randrange(CROP_PX), 0), CANVAS_PX - CROP_PX)
        left = min(max(x - rng.randrange(CROP_PX), 0), CANVAS_PX - CROP_PX)
        out.append(picture[:, top : top + CROP_PX, left : left + CROP_PX])
    return torch.stack(out)


def train(seed: int, allowed: list[tuple[str, str, str]], steps: int = STEPS) -> AutoencoderKL:
    """Return a trained autoencoder: crops in the first half, whole pictures in the second."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = untrained().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        whole = step >= steps // 2
        pictures, _ = draw_batch(8 if whole else 16, rng, allowed)
        if not whole:
            pictures = _crop_on_outline(pictures, rng)
        pictures = pictures.to(memory_format=torch.channels_last)
        posterior = model.encode(pictures).latent_dist
        error = model.decode(posterior.sample()).sample - pictures
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.pow(2).mean() + KL_WEIGHT * min(1, step / KL_WARMUP_STEPS) * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            psnr = -10 * math.log10(float(error.detach().pow(2).mean()) / 4)
            passed_s = time.perf_counter() - start
            print(
                f"vae {step:5d}/{steps} loss {float(loss.detach()):.4f} psnr {psnr:.1f} dB {passed_s:.0f} s", flush=True
            )
    return model.eval().requires_grad_(False)


def refine(model: AutoencoderKL, seed: int, allowed: list[tuple[str, str, str]], steps: int = REFINE_STEPS) -> None:
    """Train the decoder alone on what it will meet: latents that are a little wrong, and windows of latents.

    Latents stay as they are, so that a transformer trained on them is not touched. Generated latents are never exact:
    noise, half of it smooth, teaches the decoder to draw a clean outline all the same. Tiled decoding cuts windows out
    of latents that were encoded whole: half of the steps do the same.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model.to(memory_format=torch.channels_last)
    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=REFINE_LEARNING_RATE, weight_decay=0.0)
    start = time.perf_counter()
    scale = CANVAS_PX // LATENT_SIDE
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = REFINE_LEARNING_RATE * min(1, step / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        pictures, _ = draw_batch(8, rng, allowed)
        with torch.no_grad():
            latents = model.encode(pictures.to(memory_format=torch.channels_last)).latent_dist.mode()
        smooth = torch.nn.functional.interpolate(torch.randn(8, CHANNELS, 4, 4), size=LATENT_SIDE, mode="bilinear")
        noise = torch.where(torch.rand(8, 1, 1, 1) < 0.5, torch.randn_like(latents), smooth)
        latents = latents + noise * torch.rand(8, 1, 1, 1) * REFINE_NOISE
        if step % 2:
            side = CROP_PX // scale
            y, x = rng.randrange(LATENT_SIDE - side + 1), rng.randrange(LATENT_SIDE - side + 1)
            latents = latents[:, :, y : y + side, x : x + side]
            pictures = pictures[:, :, y * scale : y * scale + CROP_PX, x * scale : x * scale + CROP_PX]
        error = model.decode(latents.contiguous(memory_format=torch.channels_last)).sample - pictures
        loss = error.abs().mean() + error.pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            passed_s = time.perf_counter() - start
            print(f"refine {step:5d}/{steps} loss {float(loss.detach()):.4f} {passed_s:.0f} s", flush=True)
    model.requires_grad_(False)


@torch.no_grad()
def encode(
    model: AutoencoderKL, count: int, seed: int, allowed: list[tuple[str, str, str]]
) -> tuple[Tensor, list[Scene]]:
    """Return latents [count, 8, 16, 16] (the posterior's mode) of fresh pictures, and their scenes."""
    rng = random.Random(seed)
    latents: list[Tensor] = []
    scenes: list[Scene] = []
    for begin in range(0, count, 100):
        pictures, batch = draw_batch(min(100, count - begin), rng, allowed)
        latents.append(model.encode(pictures.to(memory_format=torch.channels_last)).latent_dist.mode())
        scenes += batch
    return torch.cat(latents).contiguous(), scenes


@torch.no_grad()
def fold_statistics(model: AutoencoderKL, latents: Tensor) -> Tensor:
    """Make the latents zero-mean, unit-variance per channel inside the model, and return them so.

    Both 1 x 1 convolutions next to the latents absorb the affine map, exactly; the pipeline then needs no
    per-channel constants that `AutoencoderKL` has no place for.
    """
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:CHANNELS] /= std.view(-1, 1, 1, 1)
    quant.bias[:CHANNELS] = (quant.bias[:CHANNELS] - mean) / std
    # The other half of quant_conv is the log-variance: dividing by std shifts it by -2 log(std).
    quant.bias[CHANNELS:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std.view(1, -1, 1, 1)
    return (latents - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
