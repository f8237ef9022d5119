"""Train the FLUX transformer and both text encoders together, by flow matching on precomputed latents."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from tools.tiny_flux.muon import Muon
from tools.tiny_flux.scenes import Scene, training_prompt
from tools.tiny_flux.text import WIDTH, clip_encoder, t5_encoder

STEPS = 3900
BATCH = 64
WARMUP_STEPS = 150
MUON_LR = 0.02
ADAM_LR = 2e-3
EMA = 0.998
T5_TOKENS = 16
CLIP_TOKENS = 20
# A pipeline pads T5 to its `max_sequence_length`, 512 unless told otherwise, with no mask: some batches must see that.
LONG_SHARE = 0.08
LONG_BATCH = 24
LONG_TOKENS = (32, 512)


@dataclass(frozen=True)
class Networks:
    """The trained half of the pipeline."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    def parameters(self) -> list[nn.Parameter]:
        return [*self.transformer.parameters(), *self.clip.parameters(), *self.t5.parameters()]


def untrained(clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> Networks:
    """Return the architecture with FLUX's own initialisation: modulations and the last projection start at zero."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or ".norm" in f".{name}"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return Networks(transformer, clip_encoder(clip_tokenizer), t5_encoder(t5_tokenizer))


def pack(latents: Tensor) -> Tensor:
    """Return latents [batch, 8, 16, 16] as FLUX's tokens [batch, 64, 32]."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def _optimizers(networks: Networks) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in networks.transformer.named_parameters():
        is_block = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        (matrices if is_block and parameter.ndim == 2 else rest).append(parameter)
    rest += [*networks.clip.parameters(), *networks.t5.parameters()]
    return [Muon(matrices, lr=MUON_LR), torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01)]


def _times(count: int) -> Tensor:
    """Return noise levels in (0, 1), most of them around the middle, where the picture is decided."""
    times = torch.sigmoid(torch.randn(count) + 0.3)
    uniform = torch.rand(count)
    return torch.where(torch.rand(count) < 0.1, uniform, times)


def train(
    latents: Tensor,
    scenes: list[Scene],
    clip_tokenizer: CLIPTokenizer,
    t5_tokenizer: T5Tokenizer,
    seed: int,
    steps: int = STEPS,
    compile_step: bool = True,
) -> Networks:
    """Return trained networks (their exponential moving average)."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    networks = untrained(clip_tokenizer, t5_tokenizer)
    optimizers = _optimizers(networks)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = networks.parameters()
    average = [p.detach().clone() for p in parameters]
    tokens = pack(latents)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
    usual = torch.compile(networks.transformer) if compile_step else networks.transformer
    start = time.perf_counter()
    smooth = 2.0  # the loss of predicting nothing
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        is_long = rng.random() < LONG_SHARE
        length = rng.randint(*LONG_TOKENS) if is_long else T5_TOKENS
        chosen = [rng.randrange(len(scenes)) for _ in range(LONG_BATCH if is_long else BATCH)]
        prompts = [training_prompt(scenes[i], rng) for i in chosen]
        t5_ids = t5_tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        clip_ids = clip_tokenizer(
            prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        clean = tokens[chosen]
        noise = torch.randn_like(clean)
        times = _times(len(chosen))
        t = times.view(-1, 1, 1)
        predicted = (networks.transformer if is_long else usual)(
            hidden_states=(1 - t) * clean + t * noise,
            timestep=times,
            pooled_projections=networks.clip(clip_ids).pooler_output,
            encoder_hidden_states=networks.t5(t5_ids)[0],
            txt_ids=torch.zeros(length, 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        loss = (predicted - (noise - clean)).pow(2).mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            # A short memory at first, so that the average forgets the initialisation.
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(EMA, step / (step + 10)))
        smooth += 0.02 * (float(loss.detach()) - smooth)
        if step % 100 == 0 or step == steps - 1:
            print(f"flow {step:5d}/{steps} loss {smooth:.4f} {time.perf_counter() - start:.0f} s", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    for network in (networks.transformer, networks.clip, networks.t5):
        network.eval().requires_grad_(False)
    return networks
