"""What stands in for a dry run that stopped: the components one by one, each called as its configuration suggests.

It is less than a run: what a pipeline holds between its components is not seen, and nor is what it computes itself. The
operation that stopped the run is kept with the trace, and its `basis` says "component".
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engine.dryrun import phases, record
from engine.dryrun.follow import Follower
from engine.dryrun.operators import Target
from engine.facts import attention
from engine.values import Request

_TOKENS = 512
_CLIP_TOKENS = 77
_SIDE = 1024


def trace_each(modules: dict[str, nn.Module], follower: Follower, request: Request, target: str) -> list[str]:
    """Call each component once under the follower, and return what could not be called, with the reason.

    Text encoders come first, then what denoises (twice, for what differs the second time), then the VAE's decoding.
    """
    silent = []
    batch = max(1, request.batch)
    denoising = next((n for n in modules if n in attention.DENOISERS), None)
    with torch.no_grad(), record.marked(modules, follower), Target(target), follower:
        for name, module in sorted(modules.items(), key=lambda item: _place(item[0])):
            for _ in range(2 if name in attention.DENOISERS else 1):
                try:
                    _call(name, module, request, batch)
                    if name == denoising:
                        follower.builder.step()
                except Exception as error:  # noqa: BLE001 - what a foreign component raises is not one class
                    silent.append(f"{name} alone: {' '.join(str(error).split())[:120]}")
                    break
    return silent


def _place(name: str) -> int:
    return 0 if phases.is_encoder(name) else 2 if name == "vae" else 1


def _call(name: str, module: nn.Module, request: Request, batch: int) -> None:
    if name == "vae":
        module.decode(_latents(module, request, batch))  # type: ignore[operator]
    elif phases.is_encoder(name):
        ids = torch.zeros(batch, _tokens(module), dtype=torch.long, device="meta")
        module(input_ids=ids)
    else:
        module(**dict(_arguments(module, request, batch)))


def _tokens(module: nn.Module) -> int:
    longest = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    return min(longest, _TOKENS) if isinstance(longest, int) else _TOKENS


def _config(module: nn.Module | None, *names: str) -> Any:
    config = getattr(module, "config", {})
    found = (getattr(config, n, None) for n in names)
    return next((f for f in found if f is not None), None)


def _latents(
    module: nn.Module, request: Request, batch: int, channels: int | None = None, *, is_vae: bool = True
) -> torch.Tensor:
    """Return latents of the request's size, eight pixels to one: a picture's, or a video's where one is made of it."""
    vae = module if is_vae else None
    scale = _config(vae, "scale_factor_spatial", "spatial_compression_ratio") or 8
    widths = _config(vae, "block_out_channels")
    if not isinstance(scale, int):
        scale = 8
    if widths and _config(vae, "scale_factor_spatial", "spatial_compression_ratio") is None:
        scale = 2 ** (len(widths) - 1)
    channels = channels or _config(vae, "latent_channels", "z_dim") or 4
    sides = [(request.height or _SIDE) // scale, (request.width or _SIDE) // scale]
    frames = request.frames or 1
    is_video = frames > 1 or any(isinstance(m, nn.Conv3d) for m in module.modules())
    time = [(frames - 1) // 4 + 1] if is_video else []
    dtype = next((p.dtype for p in vae.parameters()), torch.float32) if vae is not None else torch.float32
    return torch.empty(batch, channels, *time, *sides, dtype=dtype, device="meta")


def _arguments(module: nn.Module, request: Request, batch: int) -> Iterator[tuple[str, Any]]:
    """Yield what a denoiser's forward needs, by the names that diffusers' models share."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    channels = _config(module, "in_channels") or 4

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    latents = _latents(module, request, batch, channels, is_vae=False).to(dtype)
    # What a text encoder gives: a model that projects it first has another width inside.
    widths = ("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim")
    width = int(_config(module, *widths) or 4096)
    words = _TOKENS if width > 2048 else _CLIP_TOKENS
    is_packed = "img_ids" in inspect.signature(module.forward).parameters
    tokens = (request.height or _SIDE) // 16 * ((request.width or _SIDE) // 16)
    known = {
        "sample": latents,
        "hidden_states": empty(batch, tokens, channels) if is_packed else latents,
        "encoder_hidden_states": empty(batch, words, width),
        "timestep": empty(batch),
        "pooled_projections": empty(batch, _config(module, "pooled_projection_dim") or 768),
        "guidance": empty(batch),
        "img_ids": empty(tokens, 3),
        "txt_ids": empty(words, 3),
    }
    for name, parameter in inspect.signature(module.forward).parameters.items():
        is_needed = parameter.default is inspect.Parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if name in known and (is_needed or name != "guidance" or _config(module, "guidance_embeds")):
            yield name, known[name]
