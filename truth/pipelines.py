"""Small random pipelines of many architectures, built by hand: no hub, no trained weights, real classes.

To add one: write the function, and name it in `ALL`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
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
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from engine.dryrun.tokens import StubTokenizer
from engine.optimizers import tiles

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


def cogvideox() -> tuple[Any, Call]:
    """A video DiT whose 3D VAE keeps caches of its causal convolutions."""
    pipe = CogVideoXPipeline(
        tokenizer=StubTokenizer(226),
        text_encoder=_t5(),
        scheduler=CogVideoXDDIMScheduler(),
        vae=AutoencoderKLCogVideoX(
            in_channels=3,
            out_channels=3,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=64,
            sample_width=64,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=32,
            num_layers=2,
            sample_width=8,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
    )
    call: Call = {"prompt": "x", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    return pipe, call | {"guidance_scale": 6.0, "max_sequence_length": 16}


def hunyuan_video() -> tuple[Any, Call]:
    """A video MMDiT with a language model as its text encoder."""
    llama = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=StubTokenizer(600),
        text_encoder_2=_clip(),
        tokenizer_2=StubTokenizer(77),
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(2, 4, 10),
        ),
        vae=AutoencoderKLHunyuanVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    call: Call = {"prompt": "x", "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    return pipe, call | {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 16}


def qwen_image() -> tuple[Any, Call]:
    """An MMDiT with a vision-language model as its text encoder, guided in two passes."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "vocab_size": 1000,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32},
        hidden_size=32,
        vocab_size=1000,
        vision_end_token_id=901,
        vision_start_token_id=902,
        vision_token_id=903,
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=1.15, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=StubTokenizer(600),
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=32,
            guidance_embeds=False,
            axes_dims_rope=(8, 4, 4),
        ),
    )
    call: Call = {"prompt": "x", "negative_prompt": "y", "height": 64, "width": 64, "num_inference_steps": 2}
    return pipe, call | {"true_cfg_scale": 4.0, "max_sequence_length": 16}


def _gemma() -> Gemma2Model:
    config = Gemma2Config(
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    return Gemma2Model(config)


def lumina2() -> tuple[Any, Call]:
    """A DiT that refines the text by itself, with a language model as its text encoder."""
    pipe = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            ffn_dim_multiplier=None,
            norm_eps=1e-5,
            scaling_factor=1.0,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 64, 64),
            cap_feat_dim=32,
            num_refiner_layers=1,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        text_encoder=_gemma(),
        tokenizer=StubTokenizer(256),
    )
    call: Call = {"prompt": "x", "height": 64, "width": 64, "num_inference_steps": 2}
    return pipe, call | {"max_sequence_length": 16}


def sana() -> tuple[Any, Call]:
    """A linear DiT with a deeply compressing autoencoder."""
    pipe = SanaPipeline(
        tokenizer=StubTokenizer(300),
        text_encoder=_gemma(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=32,
        ),
    )
    call: Call = {"prompt": "x", "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}
    return pipe, call | {"use_resolution_binning": False, "complex_human_instruction": None}


def mochi() -> tuple[Any, Call]:
    """A video DiT of unequal streams; its text encoder reads in float32 where the call says so."""
    pipe = MochiPipeline(
        transformer=MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            out_channels=None,
            qk_norm="rms_norm",
            text_embed_dim=32,
            time_embed_dim=4,
            activation_fn="swiglu",
            max_sequence_length=16,
        ),
        vae=AutoencoderKLMochi(
            latent_channels=12,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=_t5(),
        tokenizer=StubTokenizer(256),
    )
    call: Call = {"prompt": "x", "height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 2}
    return pipe, call | {"max_sequence_length": 16}


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
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "qwen_image": qwen_image,
    "lumina2": lumina2,
    "sana": sana,
    "mochi": mochi,
}


def _small_tiles(vae: Any) -> None:
    """Let tiling begin at the sizes of these pipelines: at 64 pixels, a quarter of them overlapping."""
    for side in ("height", "width"):
        if hasattr(vae, f"tile_sample_stride_{side}"):
            setattr(vae, f"tile_sample_min_{side}", 64)
            setattr(vae, f"tile_sample_stride_{side}", 48)
    # AutoencoderDC works out the tiles of its latents when tiling is switched on.
    is_on = vae.use_tiling
    vae.enable_tiling()
    vae.use_tiling = is_on
    tiles.take_for_own(vae)


def made(name: str, *, small_tiles: bool = True) -> tuple[Any, Call]:
    """Return a pipeline of that name, its random weights always the same, and the arguments of a small call.

    `small_tiles`: its VAE's own tiles are smaller than its class has them.
    """
    torch.manual_seed(0)
    pipe, call = ALL[name]()
    pipe.set_progress_bar_config(disable=True)
    if small_tiles:
        _small_tiles(pipe.vae)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipe, call | {"output_type": "np"}
