"""Small random pipelines of many architectures, built by hand: no hub, no trained weights, real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from engine.dryrun.tokens import StubTokenizer

Call = dict[str, Any]


def _clip(cls: Any = CLIPTextModel, width: int = 32) -> Any:
    config = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return cls(config)


def _t5(cls: Any = T5EncoderModel, config: Any = T5Config, width: int = 32) -> Any:
    return cls(config(vocab_size=1000, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0))


def _vae(channels: int = 4, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        **more,
    )


def _unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        **{
            "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
        }
        | more,
    )


def sd() -> tuple[Any, Call]:
    """A UNet with guidance in one doubled batch."""
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=StubTokenizer(77),
        unet=_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt": "x", "height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 7.5}


def sd_img2img() -> tuple[Any, Call]:
    """The VAE encodes first: a picture goes in."""
    pipe, _ = sd()
    made = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image = torch.zeros(1, 3, 64, 64)
    return made, {"prompt": "x", "image": image, "num_inference_steps": 4, "strength": 0.5}


def sdxl() -> tuple[Any, Call]:
    """Two text encoders, added conditions, an Euler scheduler."""
    pipe = StableDiffusionXLPipeline(
        vae=_vae(force_upcast=False),
        text_encoder=_clip(),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=StubTokenizer(77),
        tokenizer_2=StubTokenizer(77),
        unet=_unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 32,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=EulerDiscreteScheduler(),
    )
    return pipe, {"prompt": "x", "height": 64, "width": 64, "num_inference_steps": 2}


def sd3() -> tuple[Any, Call]:
    """An MMDiT with three text encoders and guidance."""
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_projection_dim=64,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=48,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=_t5(width=64),
        tokenizer=StubTokenizer(77),
        tokenizer_2=StubTokenizer(77),
        tokenizer_3=StubTokenizer(77),
    )
    return pipe, {"prompt": "x", "height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 77}


def pixart() -> tuple[Any, Call]:
    """A DiT with cross-attention and a mask over the text."""
    pipe = PixArtSigmaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            cross_attention_dim=64,
            caption_channels=32,
        ),
        scheduler=DDIMScheduler(),
        vae=_vae(),
        text_encoder=_t5(),
        tokenizer=StubTokenizer(300),
    )
    return pipe, {
        "prompt": "x",
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "use_resolution_binning": False,
        "max_sequence_length": 64,
    }


def wan() -> tuple[Any, Call]:
    """A video DiT, guided in two passes, with a causal video VAE that keeps a cache between frames."""
    pipe = WanPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=64,
            ffn_dim=64,
            num_layers=2,
        ),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config),
        tokenizer=StubTokenizer(512),
    )
    return pipe, {
        "prompt": "x",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": 32,
    }


def ltx() -> tuple[Any, Call]:
    """Another video DiT, guided in one doubled batch."""
    pipe = LTXPipeline(
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            num_layers=2,
            caption_channels=32,
        ),
        vae=AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(16, 16, 16, 16),
            decoder_block_out_channels=(16, 16, 16, 16),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            timestep_conditioning=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_t5(),
        tokenizer=StubTokenizer(128),
    )
    return pipe, {
        "prompt": "x",
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": 32,
    }


def flux() -> tuple[Any, Call]:
    """The embedded pipeline, with real guidance in two passes."""
    from diffusers import DiffusionPipeline

    from engine import paths

    pipe = DiffusionPipeline.from_pretrained(paths.embedded_model_dir())
    pipe.tokenizer, pipe.tokenizer_2 = StubTokenizer(77), StubTokenizer(512)
    call: Call = {"prompt": "x", "negative_prompt": "", "true_cfg_scale": 2.5, "max_sequence_length": 32}
    return pipe, call | {"height": 128, "width": 128, "num_inference_steps": 2}


ALL: dict[str, Callable[[], tuple[Any, Call]]] = {
    "sd": sd,
    "sd_img2img": sd_img2img,
    "sdxl": sdxl,
    "sd3": sd3,
    "pixart": pixart,
    "wan": wan,
    "ltx": ltx,
    "flux": flux,
}


def made(name: str) -> tuple[Any, Call]:
    """Return a pipeline of that name, its random weights always the same, and the arguments of a small call."""
    torch.manual_seed(0)
    pipe, call = ALL[name]()
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe, call | {"output_type": "np"}
