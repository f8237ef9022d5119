"""Plans applied twice, to pipelines that somebody changed, to other components than were planned; and taken back."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import optimizers, paths
from engine.errors import IncompatibleError
from engine.optimizers import group_offload
from engine.optimizers.spec import Context, NotApplied, denoisers, modules
from engine.run import applied, load
from engine.run.progress import Quiet
from tests import conftest
from tests.conftest import machine
from tests.test_run import ACTING, _stand_in
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")


def plan_for(*steps: Any, **more: Any) -> engine.Plan:
    return engine.resolve(optimizers=list(steps), hardware=machine(), **more)


def step(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params}


def draw(pipe: Any) -> Any:
    """The smallest picture there is."""
    return conftest.draw(pipe, height=64, width=64, num_inference_steps=1)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The picture of a pipeline to which nothing was done."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(paths.embedded_model_dir())
    pipe.set_progress_bar_config(disable=True)
    return draw(pipe)


class Said(Quiet):
    """Collects what is said while a plan is applied."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line.strip())


def by_hand(pipe: Any, *given: dict[str, Any]) -> None:
    """Do what optimizers do, as a caller of the libraries would have."""
    for one in given:
        made = optimizers.spec(one["name"]).step(one["params"])
        optimizers.get(made.name).apply(pipe, made, HERE)


def weights(pipe: Any) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {
        f"{name}.{path}": (str(p.device), str(p.dtype), tuple(p.shape))
        for name, module in modules(pipe).items()
        for path, p in [*module.named_parameters(), *module.named_buffers()]
    }


def _modules_left(pipe: Any) -> set[str]:
    """The classes of processors and the attributes that hooks leave, in all components."""
    parts = [m for c in modules(pipe).values() for m in c.modules()]
    hooked = {k for m in parts for k in vars(m) if k in ("_hf_hook", "_old_forward")}
    hooked |= {n for m in parts if hasattr(m, "_diffusers_hook") for n in m._diffusers_hook.hooks}
    return hooked | {type(m.processor).__name__ for m in parts if hasattr(m, "processor")}


UNDONE = {n: s for n, s in ACTING.items() if optimizers.optional(s["name"], "undo")}


@pytest.mark.parametrize("name", UNDONE)
def test_what_is_undone_leaves_the_pipeline_as_it_was_given(pipe: Any, name: str, plain: Any) -> None:
    before, left = weights(pipe), _modules_left(pipe)
    made = optimizers.spec(ACTING[name]["name"]).step(ACTING[name]["params"])
    load.apply_all([made], pipe, HERE, Said())
    _stand_in(pipe)
    said = Said()
    applied.undo(pipe, load._planned([made], pipe), HERE, said)
    assert f"{made.name}: taken back" in said.lines
    assert weights(pipe) == before and _modules_left(pipe) == left
    assert not [k for k in vars(pipe) if k.startswith("_dg_run") or "offload" in k]
    assert np.array_equal(draw(pipe), plain)


def test_a_text_encoder_whose_embeddings_are_one_has_one_again_after_sequential_offload(pipe: Any) -> None:
    encoder = pipe.text_encoder_2
    count = len(list(encoder.parameters()))
    made = optimizers.spec("sequential_offload").step()
    load.apply_all([made], pipe, HERE, Said())
    applied.undo(pipe, load._planned([made], pipe), HERE, Said())
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert len(list(encoder.parameters())) == count


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart"])
def test_fused_projections_of_older_attention_are_freed_and_can_be_fused_again(name: str) -> None:
    pipe, _ = pipelines.made(name)
    module = next(iter(denoisers(pipe).values()))
    made, before = optimizers.spec("fuse_qkv").step(), weights(pipe)
    kinds = [type(p) for p in module.attn_processors.values()]
    for _ in range(2):
        load.apply_all([made], pipe, HERE, Said())
        assert len(weights(pipe)) > len(before)
        applied.undo(pipe, load._planned([made], pipe), HERE, Said())
        assert weights(pipe) == before
        assert [type(p) for p in module.attn_processors.values()] == kinds


def test_sliced_attention_is_undone_to_the_very_processors_that_were_there() -> None:
    pipe, _ = pipelines.made("sd")
    before = dict(pipe.unet.attn_processors)
    made = optimizers.spec("attention_slicing").step()
    load.apply_all([made], pipe, HERE, Said())
    applied.undo(pipe, load._planned([made], pipe), HERE, Said())
    assert all(pipe.unet.attn_processors[k] is p for k, p in before.items())


def test_tiles_are_the_librarys_own_again_after_an_undo(pipe: Any) -> None:
    before = {k: v for k, v in vars(pipe.vae).items() if k.startswith("tile_") or k == "use_tiling"}
    plan = plan_for("vae_slicing", step("vae_tiling", tile=64), height=256, width=256)
    plan.apply(pipe)
    assert pipe.vae.use_tiling and pipe.vae.tile_sample_min_size == 64
    plan.undo(pipe)
    assert {k: v for k, v in vars(pipe.vae).items() if k.startswith("tile_") or k == "use_tiling"} == before
    assert not pipe.vae.use_slicing


def test_a_plan_that_cannot_be_undone_whole_is_not_touched_and_says_which_step_and_why(pipe: Any) -> None:
    plan = plan_for("vae_slicing", step("layerwise_casting", storage="float16"), batch=2)
    plan.apply(pipe)
    with pytest.raises(IncompatibleError, match=r"^layerwise_casting cannot be taken back") as caught:
        plan.undo(pipe)
    assert "precision" in caught.value.why
    assert pipe.vae.use_slicing
    said = Said()
    assert load.apply(plan, pipe, said) is pipe
    assert said.lines[0] == "already applied"


def test_what_was_not_applied_is_not_undone(pipe: Any) -> None:
    plan = plan_for("vae_slicing", batch=2)
    with pytest.raises(IncompatibleError, match="was not applied to this pipeline"):
        plan.undo(pipe)
    plan.apply(pipe)
    with pytest.raises(IncompatibleError, match="was not applied to this pipeline") as caught:
        plan_for("vae_tiling").undo(pipe)
    assert "what was applied is vae_slicing" in caught.value.why
    plan.undo(pipe)
    with pytest.raises(IncompatibleError, match="was not applied"):
        plan.undo(pipe)


def test_a_plan_that_is_applied_again_is_verified_again_and_changes_nothing(pipe: Any) -> None:
    plan = plan_for("fuse_qkv", "vae_slicing", step("layerwise_casting", storage="float16"), batch=2)
    plan.apply(pipe)
    before, said = weights(pipe), Said()
    assert load.apply(plan, pipe, said) is pipe
    assert said.lines[0] == "already applied" and len(said.lines) == 5
    assert weights(pipe) == before
    larger = plan_for("fuse_qkv", "vae_slicing", step("layerwise_casting", storage="float16"), batch=3)
    larger.apply(pipe)  # another request, and the same steps
    pipe.vae.disable_slicing()
    with pytest.raises(NotApplied, match="vae_slicing"):
        plan.apply(pipe)


def test_an_offload_that_is_applied_again_is_not_put_over_itself(pipe: Any) -> None:
    made = [optimizers.spec("group_offload").step({"use_stream": False})]
    plan = dataclasses.replace(plan_for("resident"), optimizers=tuple(made))
    load.apply_steps(plan, pipe, HERE)
    hooks = group_offload._hooks(pipe.transformer)
    load.apply_steps(plan, pipe, HERE)
    assert hooks and group_offload._hooks(pipe.transformer) == hooks


def test_another_plan_is_refused_until_the_first_is_undone(pipe: Any) -> None:
    first, second = plan_for("vae_slicing", batch=2), plan_for("fuse_qkv")
    first.apply(pipe)
    with pytest.raises(IncompatibleError, match="another plan was applied") as caught:
        second.apply(pipe)
    assert "vae_slicing" in caught.value.why
    first.undo(pipe)
    assert second.apply(pipe) is pipe


def test_a_component_that_was_replaced_after_the_plan_was_applied_is_named(pipe: Any) -> None:
    plan = plan_for("vae_slicing", batch=2)
    plan.apply(pipe)
    pipe.vae = type(pipe.vae).from_config(pipe.vae.config)
    with pytest.raises(IncompatibleError, match=r"^vae of the pipeline was replaced"):
        plan.apply(pipe)


def test_what_was_applied_keeps_no_pipeline_alive(pipe: Any) -> None:
    plan = plan_for("vae_slicing", batch=2)
    other = type(pipe)(**pipe.components)
    plan.apply(other)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def _sliced_unet() -> Any:
    pipe, _ = pipelines.made("sd")
    by_hand(pipe, step("attention_slicing", slices="max"))
    return pipe


# What a caller may have done, and what a plan says of it: a part of the error, or None where it is taken as it is.
MODIFIED: dict[str, tuple[Callable[[Any], Any], list[Any], str | None]] = {
    "cast with another storage": (
        lambda pipe: by_hand(pipe, step("layerwise_casting", storage="bfloat16")),
        [step("layerwise_casting", storage="float16")],
        "layerwise_casting acts on this pipeline already, otherwise",
    ),
    "cast as planned": (
        lambda pipe: by_hand(pipe, step("layerwise_casting", storage="float16")),
        [step("layerwise_casting", storage="float16")],
        None,
    ),
    "cast, and not planned": (
        lambda pipe: by_hand(pipe, step("layerwise_casting", storage="float16")),
        ["vae_slicing"],
        "layerwise_casting acts on this pipeline already, and is not in the plan",
    ),
    "tiling with other tiles": (
        lambda pipe: by_hand(pipe, step("vae_tiling", tile=64)),
        [step("vae_tiling", tile=128)],
        "vae_tiling acts on this pipeline already, otherwise",
    ),
    "tiling with other tiles than the library's own": (
        lambda pipe: by_hand(pipe, step("vae_tiling", tile=128)),
        ["vae_tiling"],
        "vae_tiling acts on this pipeline already, otherwise",
    ),
    "tiling as planned": (lambda pipe: pipe.vae.enable_tiling(), ["vae_tiling"], None),
    "tiling, and not planned": (lambda pipe: pipe.vae.enable_tiling(), ["vae_slicing"], "vae_tiling acts"),
    "fused": (lambda pipe: pipe.transformer.fuse_qkv_projections(), ["vae_slicing"], "fuse_qkv acts"),
    "fused as planned": (lambda pipe: pipe.transformer.fuse_qkv_projections(), ["fuse_qkv"], None),
    "a kernel of attention": (
        lambda pipe: pipe.transformer.transformer_blocks[0].attn.set_attention_backend("_native_math"),
        ["vae_slicing"],
        "attention_backend acts",
    ),
    "another dtype than planned": (
        lambda pipe: pipe.transformer.to(torch.bfloat16),
        [step("dtype", value="float32")],
        "dtype acts while a pipeline is loaded",
    ),
    "another dtype, and none planned": (
        lambda pipe: pipe.to(torch.bfloat16),
        ["vae_slicing"],
        "the plan has no dtype",
    ),
    "offloaded": (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        ["vae_slicing"],
        r"already offloaded \(.*: model_offload\)",
    ),
    "in groups": (
        lambda pipe: by_hand(pipe, ACTING["group_offload leaf"]),
        ["vae_slicing"],
        r"already offloaded \(.*: group_offload\)",
    ),
}


@pytest.mark.parametrize("name", MODIFIED)
def test_a_pipeline_that_somebody_changed_is_refused_by_name_or_taken_as_it_is(pipe: Any, name: str) -> None:
    change, steps, refused = MODIFIED[name]
    change(pipe)
    plan = plan_for(*steps, height=256, width=256, batch=2)
    if refused is not None:
        with pytest.raises(IncompatibleError, match=refused):
            plan.apply(pipe)
        return
    before, tiles = weights(pipe), pipe.vae.use_tiling
    assert plan.apply(pipe) is pipe
    assert weights(pipe) == before
    plan.undo(pipe)  # what somebody else did is not taken back
    assert weights(pipe) == before and pipe.vae.use_tiling == tiles


def test_attention_that_is_sliced_already_is_refused_otherwise_than_planned() -> None:
    pipe = _sliced_unet()
    plan = engine.resolve(pipe, optimizers=[step("attention_slicing")], hardware=machine(), height=64, width=64)
    with pytest.raises(IncompatibleError, match="attention_slicing acts on this pipeline already, otherwise"):
        plan.apply(pipe)
    planned = engine.resolve(
        pipe, optimizers=[step("attention_slicing", slices="max")], hardware=machine(), height=64, width=64
    )
    assert planned.apply(pipe) is pipe


def test_a_lora_that_is_loaded_and_not_fused_is_refused_until_it_is(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    plan = plan_for("vae_slicing", batch=2)
    with pytest.raises(IncompatibleError, match="a LoRA is loaded into transformer") as caught:
        plan.apply(pipe)
    assert "pipe.fuse_lora()" in caught.value.do
    pipe.fuse_lora(components=["transformer"])
    assert plan.apply(pipe) is pipe


def test_a_component_of_another_class_or_configuration_than_was_planned_is_refused(pipe: Any) -> None:
    from diffusers import AutoencoderTiny

    plan = plan_for("resident")
    vae, transformer, encoder = pipe.vae, pipe.transformer, pipe.text_encoder_2
    pipe.vae = AutoencoderTiny()
    with pytest.raises(IncompatibleError, match=r"vae of the pipeline is a AutoencoderTiny.*AutoencoderKL"):
        plan.apply(pipe)
    pipe.vae = vae
    deeper = dict(transformer.config) | {"num_single_layers": transformer.config.num_single_layers + 1}
    pipe.transformer = type(transformer).from_config(deeper)
    with pytest.raises(IncompatibleError, match="transformer of the pipeline has another configuration") as caught:
        plan.apply(pipe)
    assert f"num_single_layers is {deeper['num_single_layers']}" in caught.value.why
    pipe.transformer = transformer
    pipe.text_encoder_2 = type(encoder)(
        type(encoder.config).from_dict(encoder.config.to_dict() | {"num_layers": encoder.config.num_layers + 1})
    )
    with pytest.raises(IncompatibleError, match="text_encoder_2 of the pipeline has another configuration"):
        plan.apply(pipe)
    pipe.text_encoder_2 = None
    with pytest.raises(IncompatibleError, match="has no text_encoder_2"):
        plan.apply(pipe)
    pipe.text_encoder_2 = encoder
    with pytest.raises(IncompatibleError, match="has a text_encoder_2, and the plan is for one without"):
        plan_for("resident", components={"text_encoder_2": None}).apply(pipe)
    assert plan.apply(pipe) is pipe


def test_another_pipeline_of_the_same_components_is_refused(pipe: Any) -> None:
    from diffusers import FluxImg2ImgPipeline

    other = FluxImg2ImgPipeline(**pipe.components)
    with pytest.raises(IncompatibleError, match="is a FluxImg2ImgPipeline, and the plan is for a FluxPipeline"):
        plan_for("resident").apply(other)
