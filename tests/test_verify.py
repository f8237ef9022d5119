"""What `verify` sees: every layer, hook, flag and number of an optimizer, not only one of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine import optimizers
from engine.optimizers.spec import Context, NotApplied, denoisers
from engine.run import applied, load
from engine.run.progress import Quiet
from tests.architectures import architectures
from tests.test_run import ACTING, _stand_in, step
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")
STREAMED = {"use_stream": True}


def made(given: dict[str, Any]) -> Any:
    return optimizers.spec(given["name"]).step(given["params"])


def apply(pipe: Any, given: dict[str, Any]) -> Callable[[], str]:
    """Apply a step, and return what looks at it."""
    own = made(given)
    module = optimizers.get(own.name)
    module.apply(pipe, own, HERE)
    _stand_in(pipe)
    return lambda: module.verify(pipe, own, HERE)


def _drop(module: Any, name: str) -> None:
    module._diffusers_hook.remove_hook(name, recurse=False)


def _late_fuse(pipe: Any) -> None:
    pipe.transformer.single_transformer_blocks[-1].attn.fused_projections = False


def _uncast(pipe: Any) -> None:
    pipe.transformer.transformer_blocks[1].attn.to_k.to(torch.float32)


def _cast_more(pipe: Any) -> None:
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    layer = pipe.transformer.norm_out.linear
    apply_layerwise_casting_hook(layer, torch.float16, torch.float32, False)


def _wider(pipe: Any) -> None:
    hook = pipe.transformer.transformer_blocks[0].attn.to_q._diffusers_hook.get_hook("layerwise_casting")
    hook.compute_dtype = torch.bfloat16


def _one_group(pipe: Any, change: Callable[[Any], None]) -> None:
    change(pipe.transformer.transformer_blocks[0]._diffusers_hook.get_hook("group_offloading").group)


def _unchained(pipe: Any) -> None:
    pipe.transformer._hf_hook.prev_module_hook = None


# What somebody does to one module, and what is seen of it.
TAMPERED: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "one layer is not cast": (
        ACTING["layerwise_casting"],
        lambda pipe: pipe.transformer.transformer_blocks[1].attn.to_k._diffusers_hook.hooks.pop("layerwise_casting"),
        r"transformer_blocks.1.attn.to_k of transformer is not cast",
    ),
    "one layer's weights are wide": (ACTING["layerwise_casting"], _uncast, "to_k.weight of transformer is in torch.fl"),
    "one layer more is cast": (ACTING["layerwise_casting"], _cast_more, "norm_out.linear of transformer is cast, and"),
    "one layer computes otherwise": (ACTING["layerwise_casting"], _wider, "is cast from torch.float16 to torch.bf"),
    "one attention is whole": (step("fuse_qkv"), _late_fuse, "attn of transformer has no fused projections"),
    "slicing is off": (ACTING["vae_slicing"], lambda pipe: pipe.vae.disable_slicing(), "use_slicing is false"),
    "tiling is off": (ACTING["vae_tiling"], lambda pipe: pipe.vae.disable_tiling(), "use_tiling is false"),
    "an overlap is changed": (
        ACTING["vae_tiling"],
        lambda pipe: setattr(pipe.vae, "tile_overlap_factor", 0.125),
        "tile_overlap_factor is 0.125",
    ),
    "one number of a tile is changed": (
        step("vae_tiling", tile=128),
        lambda pipe: setattr(pipe.vae, "tile_latent_min_size", 3),
        "tile_latent_min_size is 3",
    ),
    "one component has no hook": (
        ACTING["model_offload"],
        lambda pipe: delattr(pipe.vae, "_hf_hook"),
        "vae has no offload hook",
    ),
    "nothing is sent away": (ACTING["model_offload"], _unchained, "does not send text_encoder_2 away"),
    "a hook of another device": (
        ACTING["model_offload"],
        lambda pipe: setattr(pipe.vae._hf_hook, "execution_device", torch.device("meta")),
        "the hook of vae moves it to meta",
    ),
    "one layer is not fetched": (
        ACTING["sequential_offload"],
        lambda pipe: delattr(pipe.transformer.x_embedder, "_hf_hook"),
        "x_embedder of transformer has no hook",
    ),
    "one layer holds its weights": (
        ACTING["sequential_offload"],
        lambda pipe: setattr(pipe.transformer.x_embedder, "weight", torch.nn.Parameter(torch.ones(2, 2))),
        "x_embedder of transformer still holds",
    ),
    "one leaf has no hook": (
        ACTING["group_offload leaf"],
        lambda pipe: _drop(pipe.transformer.x_embedder, "group_offloading"),
        "x_embedder of transformer has no group-offloading hook",
    ),
    "one block has no hook": (
        ACTING["group_offload block"],
        lambda pipe: _drop(pipe.transformer.transformer_blocks[1], "group_offloading"),
        "transformer_blocks.1 of transformer has no group-offloading hook",
    ),
    "one group is smaller": (
        ACTING["group_offload block"],
        lambda pipe: _one_group(pipe, lambda group: group.modules.pop()),
        "has 1 modules; planned were 2",
    ),
    "one group goes elsewhere": (
        ACTING["group_offload block"],
        lambda pipe: _one_group(pipe, lambda group: setattr(group, "onload_device", torch.device("meta"))),
        "moves from cpu to meta",
    ),
    "one component is elsewhere": (ACTING["resident"], lambda pipe: pipe.vae.to("meta"), "weights of vae are on meta"),
    "one weight is wide": (
        step("dtype", value="float32"),
        lambda pipe: pipe.transformer.transformer_blocks[1].attn.to_k.to(torch.bfloat16),
        "transformer is bfloat16 .transformer_blocks.1.attn.to_k.weight; planned was float32",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_one_module_that_is_otherwise_is_seen_and_named(pipe: Any, name: str) -> None:
    given, change, seen = TAMPERED[name]
    look = apply(pipe, given)
    assert look()
    change(pipe)
    with pytest.raises(NotApplied, match=f"^{given['name']} was applied but did not take effect") as caught:
        look()
    assert re.search(seen, caught.value.why), caught.value.why


def test_one_attention_of_a_unet_in_other_slices_is_seen() -> None:
    pipe, _ = pipelines.made("sd")
    look = apply(pipe, step("attention_slicing"))
    assert look()
    next(iter(pipe.unet.attn_processors.values())).slice_size = 1
    with pytest.raises(NotApplied, match="takes 1 heads at a time; planned was 4"):
        look()


def test_one_stride_of_a_tile_that_is_changed_is_seen() -> None:
    pipe, _ = pipelines.made("wan")
    for given in (step("vae_tiling"), step("vae_tiling", tile=64)):
        look = apply(pipe, given)
        assert look()
        pipe.vae.tile_sample_stride_width += 8
        with pytest.raises(NotApplied, match="tile_sample_stride_width"):
            look()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_loading_keeps_in_float32_is_neither_missed_nor_taken_for_an_error(dtype: str) -> None:
    pipe, _ = pipelines.made("pixart")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        module.to(getattr(torch, dtype))
    own, here = made(step("dtype", value=dtype)), Context(device="cpu", dtype=dtype)

    def look() -> str:
        return optimizers.get("dtype").verify(pipe, own, here)

    wo = [m.wo for m in pipe.text_encoder.modules() if hasattr(m, "wo")]
    if dtype == "float16":  # T5 overflows in it: transformers keeps these wide, and `.to` does not
        with pytest.raises(NotApplied, match=r"wo.weight; planned was float32"):
            look()
        for layer in wo:
            layer.to(torch.float32)
    assert look()


ON_ALL = {
    name: given
    for name, given in ACTING.items()
    if given["name"] in ("layerwise_casting", "model_offload", "sequential_offload", "group_offload", "fuse_qkv")
}


@pytest.mark.parametrize("architecture", architectures("wan"))
@pytest.mark.parametrize("name", ON_ALL)
def test_what_is_expected_is_what_the_libraries_do_on_every_architecture(architecture: str, name: str) -> None:
    from engine.errors import IncompatibleError

    pipe, _ = pipelines.made(architecture)
    try:
        look = apply(pipe, ON_ALL[name])
    except IncompatibleError:
        assert name == "fuse_qkv" and not any(
            hasattr(m, "to_qkv") for d in denoisers(pipe).values() for m in d.modules()
        )
        return
    assert look()


@pytest.mark.parametrize("name", [n for n in ACTING if optimizers.spec(ACTING[n]["name"]).is_placement])
def test_where_weights_are_is_seen_after_a_call(pipe: Any, name: str) -> None:
    given = made(ACTING[name])
    load.apply_all([given], pipe, HERE, Quiet())
    before = applied.of(pipe)
    assert before is not None and [s.name for s in before.acted] == [given.name]
    seen = load.verify_after_call(pipe)
    assert set(seen) == {str(given)}
    elsewhere = "cpu" if given.name == "sequential_offload" else "meta"
    pipe.vae.decoder.conv_in.weight = torch.nn.Parameter(torch.ones(2, 2, device=elsewhere))
    with pytest.raises(NotApplied, match=given.name):
        load.verify_after_call(pipe)
