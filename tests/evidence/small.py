"""Small random modules and pipelines, and what is done to them, for the tests beside."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine import compat, optimizers
from engine.optimizers.spec import Context
from truth import device

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def transformer(seed: int = 0, blocks: int = 2, heads: int = 2) -> Any:
    """Return a FLUX transformer of some blocks of each kind."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    made = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )
    return made.eval().requires_grad_(False)


def inputs(where: Any = CPU, tokens: int = 16, batch: int = 1) -> dict[str, Any]:
    """Return what such a transformer takes; the same numbers every time."""
    noise = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=noise).to(where)

    return {
        "hidden_states": drawn(batch, tokens, 16),
        "encoder_hidden_states": drawn(batch, 8, 32),
        "pooled_projections": drawn(batch, 32),
        "timestep": torch.full((batch,), 0.5).to(where),
        "img_ids": torch.zeros(tokens, 3).to(where),
        "txt_ids": torch.zeros(8, 3).to(where),
        "return_dict": False,
    }


def forward(module: Any, where: Any = CPU) -> torch.Tensor:
    """Return what a transformer computes, on the host."""
    out: torch.Tensor = module(**inputs(where))[0]
    return out.cpu()


def vae(seed: int = 0, **more: Any) -> Any:
    """Return a KL autoencoder that halves each side, its tiles of 32 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
    }
    return AutoencoderKL(**config | more).eval().requires_grad_(False)


def latents(side: int = 8, batch: int = 1, channels: int = 4) -> torch.Tensor:
    """Return what such an autoencoder decodes."""
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def t5() -> Any:
    """Return a T5 encoder with the gated layers that real ones have."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def clip() -> Any:
    """Return a CLIP text encoder."""
    from truth import pipelines

    return pipelines._clip().eval().requires_grad_(False)


def ids() -> torch.Tensor:
    """Return some tokens."""
    return torch.randint(3, 900, (1, 8), generator=torch.Generator().manual_seed(0))


def lora(module: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a LoRA for a pipeline's transformer, as they are loaded."""
    noise = torch.Generator().manual_seed(1)
    made = {}
    for name, layer in module.named_modules():
        if name.endswith(("to_q", "to_v")):
            made[f"transformer.{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=noise)
            made[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=noise)
    return made


def nbytes(module: Any) -> int:
    """Return the bytes of a module's weights."""
    return sum(p.nbytes for p in module.parameters())


def group(module: Any, kind: str = "leaf_level", *, stream: bool = False, **more: Any) -> None:
    """Group-offload a module to the counted device, in whatever way it can be."""
    from diffusers.hooks import apply_group_offloading

    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    arguments: dict[str, Any] = {"offload_type": kind, "use_stream": stream} | blocks | more
    if hasattr(module, "enable_group_offload"):
        module.enable_group_offload(torch.device(device.NAME), **arguments)
    else:
        apply_group_offloading(module, torch.device(device.NAME), **arguments)


def cast(module: Any, storage: torch.dtype = FP8, compute: torch.dtype = torch.float32) -> None:
    """Cast a model layer by layer."""
    module.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)


def apply(pipe: Any, *steps: Any, dtype: str = "float32", where: str | None = None) -> Any:
    """Return the pipeline with dg-run's own steps applied and verified, in this order.

    A step is a name, or (name, parameters).
    """
    here = Context(device=where or device.NAME, dtype=dtype)
    for entry in steps:
        name, params = (entry, {}) if isinstance(entry, str) else entry
        step = optimizers.spec(name).step(params)
        optimizers.get(name).apply(pipe, step, here)
        optimizers.get(name).verify(pipe, step, here)
    return pipe


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Any:
    """Return what a pipeline draws, as an array; the same noise every time."""
    made = pipe(**call | {"generator": torch.Generator().manual_seed(0), "output_type": "np"} | more)
    return np.asarray(made.images if hasattr(made, "images") else made.frames)


def peak(act: Callable[[], Any]) -> int:
    """Return the most bytes that the counted device held while something ran, beyond what it held before."""
    gc.collect()
    before = device.counts().live_bytes
    device.reset_peak()
    act()
    return device.counts().peak_bytes - before


def pinned() -> int:
    """Return the bytes of host memory that are pinned now."""
    gc.collect()
    return device.counts().pinned_bytes


def alike(one: Any, other: Any, within: float = 1e-3) -> bool:
    """Whether two results are the same, up to the order of sums."""
    one, other = np.asarray(one), np.asarray(other)
    return one.shape == other.shape and bool(np.allclose(one, other, atol=within))


def calls(module: Any) -> list[int]:
    """Return a list that grows with every forward of a module."""
    seen: list[int] = []
    module.register_forward_hook(lambda *_: seen.append(1))
    return seen


def listed(rule: str, key: str = "cls") -> set[str]:
    """Return the classes that a rule lists: of pipelines, or of the component that it speaks of."""
    (found,) = (r for r in compat.rules() if r.id == rule)
    if "pipeline" in found.when:
        return set(found.when["pipeline"])
    return set(found.when["component"][key])


def models() -> dict[str, Any]:
    """Return the model classes of the installed diffusers, by name."""
    import diffusers

    found = {n: getattr(diffusers, n, None) for n in dir(diffusers)}
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}
