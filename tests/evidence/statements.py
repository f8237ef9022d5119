"""The statements about the libraries that the rules began with, each with what holds it now.

They were collected in 2026 of diffusers 0.42.1, accelerate 1.15, transformers 5.23 and torch 2.13, and each was checked
again here. `no_longer` says what of one turned out not to hold.
"""

from __future__ import annotations

from dataclasses import dataclass

COLLECTED = 93


@dataclass(frozen=True, slots=True)
class Statement:
    """One of them, in short, and the ids of the rules and facts that say it."""

    about: str
    held_by: tuple[str, ...]
    no_longer: str = ""


def _said(about: str, *held_by: str, no_longer: str = "") -> Statement:
    return Statement(about, held_by, no_longer)


ALL = (
    _said("casting and streamed groups: casting first", "casting-before-streamed-groups"),
    _said("casting and sequential offload: casting first", "casting-before-sequential-offload"),
    _said(
        "casting, unstreamed groups and model offload: any order",
        "casting-goes-with-model-offload-and-unstreamed-groups",
    ),
    _said("casting and what a stream pins", "pinned-copies-are-as-wide-as-the-weights-were"),
    _said("casting after unstreamed leaves: wide on the bus", "what-is-cast-after-grouping-travels-wide"),
    _said("fusing a LoRA and sequential offload", "fused-lora-before-sequential-offload"),
    _said("fusing a LoRA, model offload and groups", "lora-goes-with-offloads"),
    _said("loading a LoRA into float8", "lora-before-casting-to-float8"),
    _said("fusing a LoRA in float8", "fused-lora-before-casting-to-float8"),
    _said(
        "a hook on a component after model offload",
        "a-hook-on-a-component-before-model-offload",
        "context-parallel-before-model-offload",
    ),
    _said(
        "a compiled wrapper after model offload",
        "compile-before-model-offload",
        "compiling-in-place-goes-with-model-offload",
    ),
    _said("block-level groups and a VAE", "a-vae-is-not-grouped-by-block"),
    _said("leaf-level groups and a VAE", "a-vae-is-grouped-by-leaf"),
    _said("classes that refuse groups", "some-classes-refuse-group-offload"),
    _said("one folder on disk for two modules", "one-folder-on-disk-for-each-component"),
    _said("a folder on disk that was used", "files-on-disk-are-not-written-again"),
    _said("a tied embedding on disk", "tied-embeddings-are-lost-on-disk"),
    _said("casting after groups on disk", "casting-before-groups-on-disk"),
    _said("the switches that pipelines had", "pipelines-have-no-switches-of-their-vae"),
    _said("where tiling starts", "tiling-a-small-picture"),
    _said("tiling that is never read", "tiling-that-is-never-read"),
    _said("VAEs without tiles or slices", "vaes-without-tiling", "vaes-without-slicing"),
    _said("a tile that is set alone", "a-tile-is-set-with-its-stride", "hunyuan-video-15-tiles-by-its-latents"),
    _said("a VAE that is widened, streamed", "streamed-leaves-stay-narrow"),
    _said("a VAE that is widened, cast", "a-cast-vae-is-not-widened"),
    _said("quanto under whole components", "quantized-weights-go-with-whole-components"),
    _said(
        "quanto under sequential offload and groups, with a LoRA, cast",
        *("quanto-or-sequential-offload", "quanto-or-group-offload", "quanto-or-casting"),
        *("quanto-or-lora-on-flux", "quanto-or-fused-lora"),
        no_longer="a LoRA is refused on FLUX only; on Stable Diffusion 3 it acts, and is lost when it is fused",
    ),
    _said("GGUF under groups and model offload", "quantized-weights-go-with-whole-components"),
    _said(
        "GGUF under sequential offload, a LoRA fused, cast",
        *("gguf-or-sequential-offload", "gguf-or-fused-lora", "quantized-weights-are-not-cast"),
    ),
    _said("4-bit weights of bitsandbytes under whole components", "quantized-weights-go-with-whole-components"),
    _said(
        "4-bit weights of bitsandbytes under sequential offload and groups",
        *("bnb-4bit-or-sequential-offload", "bnb-4bit-or-group-offload"),
    ),
    _said(
        "torchao's int8 under every placement, on disk, cast",
        *("torchao-int8-goes-with-placements", "torchao-or-groups-on-disk", "quantized-weights-are-not-cast"),
    ),
    _said("an attention backend leaks", "an-attention-backend-is-of-the-process"),
    _said("an attention backend on a UNet", "attention-backends-are-not-for-unets"),
    _said("an attention backend without its kernels", "an-attention-backend-needs-its-kernels"),
    _said("sliced attention without a UNet", "attention-slicing-needs-a-unet"),
    _said("sliced attention on a UNet", "attention-slicing-holds-scores"),
    _said("what fused projections cost", "fused-projections-stay-beside-the-old"),
    _said(
        "fused projections, streamed leaves and sequential offload",
        *("fused-qkv-before-group-offload", "fused-qkv-before-sequential-offload"),
    ),
    _said("casting a T5", "t5-is-cast-without-its-wo"),
    _said("a T5 in float16", "t5-keeps-its-wo-wide-in-float16"),
    _said("model offload and sequential offload", "model-offload-or-sequential-offload"),
    _said(
        "groups and the offloads",
        *("model-offload-or-group-offload", "sequential-offload-or-group-offload"),
        "hooks-of-offloads-can-be-removed-and-those-of-groups-cannot",
    ),
    _said("groups twice", "group-offload-twice"),
    _said("an offload twice", "an-offload-twice-is-one"),
    _said("moving after model offload", "resident-or-model-offload"),
    _said("moving after sequential offload", "resident-or-sequential-offload"),
    _said("moving after groups", "resident-or-group-offload"),
    _said("moving before any", "a-resident-pipeline-can-be-offloaded"),
    _said("components outside the sequence", "a-pipeline-says-in-which-order-it-offloads"),
    _said("components that are excluded", "a-pipeline-says-in-which-order-it-offloads", "groups-know-no-exclusions"),
    _said("pipelines without a sequence", "model-offload-needs-a-sequence"),
    _said("the VAE of a pipeline that takes a picture", "a-vae-that-encodes-stays-beside-the-denoiser"),
    _said("a call that raises", "what-ends-half-way-stays-on-the-device"),
    _said("importing xfuser", "xdit-does-not-import-without-an-accelerator"),
    _said("whose sequence can be split", "context-parallel-needs-a-plan"),
    _said("a split sequence beside hooks", "context-parallel-goes-with-offloads"),
    _said("a split sequence after model offload", "context-parallel-before-model-offload"),
    _said(
        "what a split sequence asks",
        *("context-parallel-divides-evenly", "context-parallel-twice", "context-parallel-needs-several-cards"),
    ),
    _said(
        "split weights beside offloads",
        *("tensor-parallel-or-model-offload", "tensor-parallel-or-sequential-offload"),
        "tensor-parallel-or-group-offload",
    ),
    _said("compiling what is resident", "compiling-goes-with-resident"),
    _said("compiling beside model offload", "one-graph-of-all-or-model-offload", "compiling-goes-with-resident"),
    _said(
        "compiling beside hooks on layers",
        *("one-graph-or-sequential-offload", "one-graph-or-group-offload"),
        "compiling-what-is-hooked-layer-by-layer",
    ),
    _said("compiling beside blocks", "blocks-are-compiled-one-by-one", "one-graph-or-group-offload"),
    _said("compiling beside casting", "one-graph-or-casting", "compiling-what-is-hooked-layer-by-layer"),
    _said("compiling by regions", "regions-need-repeated-blocks"),
    _said("caches beside placements", "a-cache-before-streamed-blocks", "caches-go-with-placements"),
    _said("the first step of FasterCache", "faster-cache-computes-its-first-step"),
    _said("caches and models", "models-without-a-cache", "one-cache-at-a-time", "a-cache-needs-its-context"),
    _said("caches in one graph", "one-graph-or-a-cache"),
    _said("the memory of caches", "what-a-cache-keeps"),
    _said("slices of one picture", "slicing-a-single-picture"),
    _said("channels_last and casting", "channels-last-goes-with-casting"),
    _said("channels_last and what moves weights", "channels-last-goes-with-what-moves-weights"),
    _said("channels_last and what copies weights", "channels-last-before-what-copies-weights"),
    _said("blocks without their number", "blocks-need-their-number"),
    _said("a stream and the number of blocks", "a-stream-takes-one-block"),
    _said("streams that are not there", "a-stream-records-what-it-streams", "streams-need-an-accelerator"),
    _said("arguments without effect", "only-a-stream-is-asynchronous", "leaves-are-not-counted-in-blocks"),
    _said("what a stream costs the host", "a-stream-pins-what-it-streams"),
    _said("recording a stream", "recorded-streams-synchronise-less"),
    _said("which VAEs ask to be widened", "which-vaes-ask-to-be-widened"),
    _said(
        "what a class keeps wide",
        *("what-a-class-keeps-wide-is-kept-while-loading", "casting-leaves-what-a-class-keeps-wide"),
    ),
    _said("a VAE in float32 beside a denoiser in float16", "a-vae-in-another-precision-than-the-denoiser"),
    _said("text encoders in blocks", "block-groups-keep-a-text-encoder-whole"),
    _said("a streamed VAE and copies ahead", "a-streamed-vae-does-not-prefetch"),
    _said("a hook on a streamed block", "a-hook-on-a-streamed-block-is-dropped"),
    _said("a batch of HunyuanVideo 1.5", "hunyuan-video-15-decodes-one-video-at-a-time"),
    _said("Allegro without tiles", "allegro-decodes-in-tiles-only"),
    _said("tiles of CogVideoX", "cogvideox-tiles-that-do-not-add-up"),
    _said("what is in no block", "streamed-blocks-leave-the-rest-unstreamed"),
    _said("buffers of streamed blocks", "buffers-of-streamed-blocks-stay"),
    _said("tiles of a streamed VAE", "tiles-under-streamed-groups"),
)
