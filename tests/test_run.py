"""Applying plans to the live embedded pipeline, and generating with it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import optimizers, paths
from engine.errors import IncompatibleError, ModelError, NothingFitsError, OutOfMemoryError, UsageError
from engine.optimizers import placing
from engine.optimizers.spec import Context, NotApplied
from engine.optimizers.spec import modules as optimizer_modules
from engine.plan import Plan
from engine.prompts import MAX_SEED
from engine.run import device, items, lacking, load
from engine.run.progress import Quiet
from tests.conftest import card, draw, machine
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")


def plan_for(*steps: Any, **more: Any) -> Plan:
    return engine.resolve(optimizers=list(steps), hardware=machine(), **more)


def step(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params}


# Each optimizer, as it acts on a device: the CPU stands in for the card, the hooks are the libraries' own.
ACTING = {
    "fuse_qkv": step("fuse_qkv"),
    "attention_backend": step("attention_backend"),
    "channels_last": step("channels_last"),
    "vae_slicing": step("vae_slicing"),
    "vae_tiling": step("vae_tiling"),
    "layerwise_casting": step("layerwise_casting", storage="float16"),
    "cache": step("cache"),
    "cache taylor": step("cache", method="taylor_seer"),
    "compile": step("compile"),
    "resident": step("resident"),
    "model_offload": step("model_offload"),
    "sequential_offload": step("sequential_offload"),
    "group_offload leaf": step("group_offload", use_stream=False),
    "group_offload block": step("group_offload", use_stream=False, type="block_level", blocks_per_group=2),
}


def applied(pipe: Any, given: dict[str, Any]) -> str:
    made = optimizers.spec(given["name"]).step(given["params"])
    module = optimizers.get(made.name)
    module.apply(pipe, made, HERE)
    _stand_in(pipe)
    return module.verify(pipe, made, HERE)


def _stand_in(pipe: Any) -> None:
    """Let the sequential hooks run on the CPU itself.

    diffusers hands them "cpu:0", and a parameter that is "moved" from "cpu" to that comes back as a plain tensor, which
    accelerate cannot put away again. A card's index has no such twin.
    """
    for component in optimizer_modules(pipe).values():
        for part in component.modules():
            if hasattr(part, "_hf_hook") and hasattr(part._hf_hook, "execution_device"):
                part._hf_hook.execution_device = torch.device("cpu")


@pytest.mark.parametrize("name", ACTING)
def test_an_optimizer_is_seen_to_hold_only_once_it_was_applied(pipe: Any, name: str) -> None:
    made = optimizers.spec(ACTING[name]["name"]).step(ACTING[name]["params"])
    if name != "resident":  # which is where the pipeline is anyway
        with pytest.raises(NotApplied):
            optimizers.get(made.name).verify(pipe, made, HERE)
    assert applied(pipe, ACTING[name])


EXACT = [n for n, s in ACTING.items() if optimizers.spec(s["name"]).quality == "exact"]


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_optimizer_leaves_the_picture_as_it_is_twice_in_a_row(pipe: Any, name: str) -> None:
    plain = draw(pipe)
    applied(pipe, ACTING[name])
    # Another layout is another kernel, which on some CPUs sums in another order: a level of 256 here and there.
    most = 1 if name == "channels_last" else 0
    for _ in range(2):
        assert np.abs(draw(pipe).astype(int) - plain).max() <= most


PERMITTED = [
    (first, second)
    for first in ("fuse_qkv", "vae_slicing", "vae_tiling", "layerwise_casting")
    for second in ("model_offload", "sequential_offload", "group_offload leaf", "group_offload block")
]


@pytest.mark.parametrize(
    ("first", "second"),
    [p if i % 5 in (0, 2) else pytest.param(*p, marks=pytest.mark.slow) for i, p in enumerate(PERMITTED)],
)
def test_the_pairs_that_the_guide_permits_work_together(pipe: Any, first: str, second: str) -> None:
    applied(pipe, ACTING[first])
    alone = draw(pipe)
    applied(pipe, ACTING[second])
    assert np.array_equal(draw(pipe), alone)


@pytest.mark.parametrize("slices", ["auto", "max"])
def test_sliced_attention_keeps_the_picture_near(slices: str) -> None:
    """The embedded model is a transformer, which has none: a small random UNet."""
    pipe, call = pipelines.made("sd")
    call |= {"height": 32, "width": 32}

    def picture() -> Any:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    plain = picture()
    made = optimizers.spec("attention_slicing").step({"slices": slices})
    with pytest.raises(NotApplied):
        optimizers.get(made.name).verify(pipe, made, HERE)
    assert applied(pipe, step("attention_slicing", slices=slices)) == "8 attentions of unet in slices"
    assert {p.slice_size for p in pipe.unet.attn_processors.values()} == {4 if slices == "auto" else 1}
    assert 0 < np.abs(picture() - plain).max() < 1e-5


@pytest.mark.parametrize("placement", ["model_offload", "sequential_offload", "group_offload leaf"])
def test_sliced_attention_and_the_offloads_work_together(placement: str) -> None:
    pipe, call = pipelines.made("sd")
    call |= {"height": 32, "width": 32}
    applied(pipe, step("attention_slicing"))
    alone = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    applied(pipe, ACTING[placement])
    assert np.array_equal(pipe(**call, generator=torch.Generator().manual_seed(0)).images, alone)


def test_the_half_of_one_head_is_one() -> None:
    pipe, call = pipelines.made("sd")
    pipe.unet = pipelines._unet(attention_head_dim=1)
    applied(pipe, step("attention_slicing"))
    assert pipe(**call).images.shape == (1, 64, 96, 3)


def test_what_does_nothing_on_a_model_is_said_in_the_plan_and_passed_over(pipe: Any) -> None:
    plan = plan_for("attention_slicing")
    assert [n.optimizer for n in plan.notes if n.kind == "no_effect"] == ["attention_slicing"]
    assert plan.apply(pipe) is pipe
    with pytest.raises(IncompatibleError, match="attention_slicing cannot act on FluxPipeline"):
        applied(pipe, step("attention_slicing"))


def test_a_switch_that_a_vae_does_not_have_is_passed_over_where_the_plan_says_so(pipe: Any) -> None:
    from diffusers import AsymmetricAutoencoderKL

    plan = plan_for("vae_slicing", "vae_tiling", height=64, width=64)
    assert {n.optimizer for n in plan.notes if n.kind == "no_effect"} == {"vae_slicing", "vae_tiling"}
    pipe.vae = AsymmetricAutoencoderKL(down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=2)
    with pytest.raises(IncompatibleError, match="vae of the pipeline is a AsymmetricAutoencoderKL"):
        load.apply(plan, pipe)
    assert load.apply_steps(plan, pipe, HERE) is pipe
    load.undo(plan, pipe)
    with pytest.raises(IncompatibleError, match="vae_tiling cannot act"):
        load.apply_steps(plan_for("vae_tiling", height=256, width=256), pipe, HERE)


def test_fp8_storage_keeps_the_picture_near(pipe: Any) -> None:
    plain = draw(pipe, num_inference_steps=8)
    applied(pipe, step("layerwise_casting"))
    difference = np.abs(draw(pipe, num_inference_steps=8).astype(int) - plain)
    assert 0 < difference.mean() < 16
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn


def test_text_encoders_in_fp8_keep_the_picture_near_and_say_what_they_compute_in(pipe: Any) -> None:
    """What a pipeline asks a text encoder for its dtype is its first weights': they are left alone."""
    plain = draw(pipe, num_inference_steps=8)
    told = applied(pipe, step("layerwise_casting", components=["text_encoder_2", "transformer"]))
    assert "text_encoder_2" in told and "transformer" in told
    assert pipe.text_encoder_2.dtype == torch.float32
    widths = {str(p.dtype) for n, p in pipe.text_encoder_2.named_parameters() if n.endswith("wo.weight")}
    assert widths == {"torch.float32"}
    difference = np.abs(draw(pipe, num_inference_steps=8).astype(int) - plain)
    assert 0 < difference.mean() < 16


def test_only_denoisers_and_text_encoders_are_cast(pipe: Any) -> None:
    with pytest.raises(IncompatibleError, match="cannot act on vae"):
        applied(pipe, step("layerwise_casting", components=["vae", "transformer"]))


@pytest.mark.parametrize(("value", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_is_what_the_whole_pipeline_is_loaded_in(value: str, torch_dtype: torch.dtype) -> None:
    pipe = plan_for(step("dtype", value=value)).load()
    assert {m.dtype for m in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)} == {torch_dtype}


def test_a_pipeline_of_another_dtype_is_refused_since_dtype_acts_while_loading(pipe: Any) -> None:
    with pytest.raises(IncompatibleError, match="dtype acts while a pipeline is loaded"):
        plan_for(step("dtype", value="bfloat16")).apply(pipe)
    assert plan_for(step("dtype", value="float32")).apply(pipe) is pipe


LEAVES, BLOCKS = {"use_stream": False}, {"use_stream": False, "type": "block_level"}
APART = {
    "vae resident, model_offload": [step("resident", components=["vae"]), step("model_offload")],
    "transformer resident, model_offload": [step("model_offload"), step("resident", components=["transformer"])],
    "text resident, sequential_offload": [
        step("sequential_offload"),
        step("resident", components=["text_encoder", "text_encoder_2"]),
    ],
    "leaves, vae resident": [step("resident", components=["vae"]), step("group_offload", **LEAVES)],
    "blocks of the transformer, leaves": [
        step("group_offload", components=["transformer"], **BLOCKS),
        step("group_offload", **LEAVES),
    ],
}


def applied_apart(pipe: Any, name: str) -> dict[str, str]:
    """Apply placements side by side, each seen to hold once all are there, and return what was said."""
    given = [optimizers.spec(s["name"]).step(s["params"]) for s in APART[name]]
    steps = placing.spread(given, optimizer_modules(pipe))
    for made in steps:
        optimizers.get(made.name).apply(pipe, made, HERE)
    _stand_in(pipe)
    return {str(made): optimizers.get(made.name).verify(pipe, made, HERE) for made in steps}


@pytest.mark.parametrize("name", APART)
def test_components_that_are_placed_apart_draw_the_same_picture_twice_in_a_row(pipe: Any, name: str) -> None:
    plain = draw(pipe)
    applied_apart(pipe, name)
    assert np.array_equal(draw(pipe), plain)
    _stand_in(pipe)
    assert np.array_equal(draw(pipe), plain)


def test_a_component_that_is_kept_out_of_model_offload_has_no_hook_after_a_call_either(pipe: Any) -> None:
    """`enable_model_cpu_offload` is called again at the end of each call: what it reads is set on the instance."""
    chain = type(pipe).model_cpu_offload_seq
    assert "vae" in chain
    applied_apart(pipe, "vae resident, model_offload")
    draw(pipe)
    assert not hasattr(pipe.vae, "_hf_hook") and hasattr(pipe.transformer, "_hf_hook")
    assert type(pipe).model_cpu_offload_seq == chain and type(pipe)._exclude_from_cpu_offload == []
    applied(pipe, step("model_offload"))
    assert hasattr(pipe.vae, "_hf_hook")


def test_groups_are_refused_where_a_component_is_offloaded_already(pipe: Any) -> None:
    applied(pipe, step("group_offload", components=["transformer"], **LEAVES))
    with pytest.raises(IncompatibleError, match="group_offload cannot act"):
        applied(pipe, step("group_offload", **BLOCKS))
    pipe.maybe_free_model_hooks()


def test_groups_are_refused_beside_another_offload(pipe: Any) -> None:
    applied(pipe, step("model_offload", components=["text_encoder", "text_encoder_2", "vae"]))
    with pytest.raises(IncompatibleError, match="is offloaded already"):
        applied(pipe, step("group_offload", components=["transformer"], **LEAVES))


def test_a_component_that_the_pipeline_does_not_have_is_told_with_the_nearest_word(pipe: Any) -> None:
    with pytest.raises(UsageError, match="no component 'transformr'") as caught:
        plan = plan_for("resident")
        named = optimizers.spec("resident").step({"components": ["transformr"]})
        load.apply(dataclasses.replace(plan, optimizers=(named,)), pipe)
    assert "did you mean 'transformer'?" in str(caught.value)


@pytest.mark.parametrize("name", ["model_offload", "sequential_offload", "group_offload leaf"])
def test_a_pipeline_that_is_already_offloaded_is_refused(pipe: Any, name: str) -> None:
    applied(pipe, ACTING[name])
    with pytest.raises(IncompatibleError, match="already offloaded"):
        plan_for("resident").apply(pipe)


def test_without_an_accelerator_an_offload_is_passed_over_and_the_run_goes_on() -> None:
    pipe = plan_for("group_offload").load()
    assert not hasattr(pipe.transformer, "_diffusers_hook")
    assert draw(pipe).shape == (1, 128, 128, 3)


def test_a_plan_that_does_not_fit_is_not_run() -> None:
    plan = engine.resolve(hardware=machine(card(2)))
    for door in (plan.load, lambda: plan.run("a red circle"), lambda: plan.apply(object())):
        with pytest.raises(NothingFitsError, match="GiB short"):
            door()


def test_pictures_carry_what_they_were_made_with() -> None:
    plan = engine.resolve(batch=2, steps=2, hardware=machine())
    pictures = list(plan.run(["a red circle on a blue background", "a white square on a red background"], seed=11))
    assert [p.info["seed"] for p in pictures] == [11, 12, 13, 14]
    assert [p.info["prompt"].split()[1] for p in pictures] == ["red", "red", "white", "white"]
    assert {p.info["plan_digest"] for p in pictures} == {plan.digest}


def test_a_seed_means_the_same_picture_alone_and_in_a_batch() -> None:
    prompt = "a red circle on a blue background"
    (alone,) = engine.resolve(steps=2, hardware=machine()).run(prompt, seed=12)
    _, second = engine.resolve(steps=2, batch=2, hardware=machine()).run(prompt, seed=11)
    difference = np.abs(np.asarray(alone).astype(int) - np.asarray(second))
    assert difference.max() <= 1
    (again,) = engine.resolve(steps=2, hardware=machine()).run(prompt, seed=12)
    assert np.array_equal(np.asarray(again), np.asarray(alone))


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a red circle", ""]])
def test_an_empty_prompt_is_refused(prompts: Any) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.resolve(hardware=machine()).run(prompts)


def test_an_argument_that_the_pipeline_does_not_take_is_named() -> None:
    plan = engine.resolve(call={"clip_skip": 2}, frames=5, hardware=machine())
    with pytest.raises(UsageError, match="FluxPipeline does not take num_frames, clip_skip"):
        list(plan.run("a red circle"))


def test_what_the_pipeline_refuses_is_a_usage_error() -> None:
    plan = engine.resolve(call={"max_sequence_length": 4096}, hardware=machine())
    with pytest.raises(UsageError, match="max_sequence_length"):
        list(plan.run("a red circle"))


def test_running_out_of_memory_has_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(FluxPipeline, "prepare_latents", refuse)
    with pytest.raises(OutOfMemoryError) as caught:
        list(engine.resolve(hardware=machine()).run("a red circle"))
    assert caught.value.exit_code == 7
    assert caught.value.why == "CUDA out of memory. Tried to allocate 2.00 GiB."


def test_a_class_that_the_library_does_not_have_is_the_models_fault(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.42.1"}')
    with pytest.raises(ModelError) as caught:
        engine.resolve(tmp_path, hardware=machine()).load()
    assert "NoSuchPipeline" in str(caught.value)


def test_a_plan_for_a_card_does_not_run_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(engine.HardwareError, match="torch cannot use the card"):
        engine.resolve(hardware=machine(card())).load()


def test_the_chosen_card_is_made_visible_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(device, "_check", lambda uuid: None)
    monkeypatch.setattr(device, "_cap", lambda plan: None)
    plan = engine.resolve(gpu=1, hardware=machine(card(20), card(20, index=1)))
    device.choose(plan)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-00000000-0000-0000-0000-000000000001"


def test_seeds_lie_in_their_range() -> None:
    assert all(0 <= items.new_seed() <= MAX_SEED for _ in range(100))


def test_an_optimizer_that_cannot_act_says_so_by_name(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NotImplementedError("`AutoencoderKL` does not implement tiling.")

    monkeypatch.setattr(pipe.vae, "enable_tiling", refuse)
    with pytest.raises(IncompatibleError, match="vae_tiling cannot act on FluxPipeline"):
        load.apply(plan_for("vae_tiling"), pipe)


def test_ctrl_c_while_torch_starts_comes_through_afterwards() -> None:
    import signal

    from engine.run import interrupt

    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with interrupt.held_back():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is before
    with interrupt.held_back():
        pass


def test_a_weight_file_that_goes_bad_while_the_model_is_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is looked at before anything starts, and once more when the libraries refuse it."""
    folder = tmp_path / "model"
    shutil.copytree(paths.embedded_model_dir(), folder)
    plan = engine.resolve(folder, hardware=machine())
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"

    def spoil(*_: object, **__: object) -> None:
        file.write_bytes(file.read_bytes()[:-7])

    monkeypatch.setattr(device, "choose", spoil)
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model.safetensors has .* where its header says"):
        plan.load()


class Lines(Quiet):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_every_component_is_told_with_its_bytes_as_it_is_loaded() -> None:
    told = Lines()
    load.load(engine.resolve(hardware=machine()), told)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (line,) = [line for line in told.lines if line.startswith(f"  {name}: ")]
        assert re.fullmatch(rf"  {name}: [\d.]+ [KM]iB in [\d.]+ m?s", line), line


def without(folder: Path, name: str) -> None:
    """Take a tensor out of a folder's file of weights."""
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("component", "name"),
    [("transformer", "x_embedder.bias"), ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight")],
)
def test_weights_that_no_file_holds_are_named(component: str, name: str, tmp_path: Path) -> None:
    """diffusers would leave them empty, and transformers would draw them at random."""
    folder = tmp_path / "model"
    shutil.copytree(Path(engine.__file__).parent / "embedded" / "tiny-flux", folder)
    without(folder / component, name)
    with pytest.raises(ModelError, match=rf"files of {component} lack 1 of its weights, such as {re.escape(name)}"):
        engine.resolve(str(folder), device="cpu").load()


@pytest.mark.parametrize(
    ("name", "lost"), [("lm_head.weight", []), ("model.norm.weight", ["model.language_model.norm.weight"])]
)
def test_a_head_is_not_asked_of_a_text_encoder(name: str, lost: list[str], tmp_path: Path) -> None:
    encoder = pipelines.made("qwen_image")[0].text_encoder
    encoder.save_pretrained(tmp_path)
    without(tmp_path, name)
    with lacking.told() as heard:
        loaded = type(encoder).from_pretrained(tmp_path)
    assert heard.of(loaded) == lost


def test_models_are_made_one_after_another_in_a_process() -> None:
    """Two at once would leave torch's `Module.register_parameter` as accelerate sets it meanwhile: on meta for good."""
    plan, entered = plan_for(), threading.Event()

    def second() -> None:
        with load.opened(plan, Quiet()):
            entered.set()

    other = threading.Thread(target=second)
    with load.opened(plan, Quiet()):
        other.start()
        assert not entered.wait(0.3)
    other.join(30)
    assert entered.is_set()
