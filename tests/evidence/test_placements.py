"""Placements beside each other, one after another, and twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import device, pipelines

OFFLOADS = ("model_offload", "sequential_offload")


def made(name: str = "pixart") -> Any:
    return pipelines.made(name)[0]


def switch(pipe: Any, offload: str) -> None:
    method = {"model_offload": "enable_model_cpu_offload", "sequential_offload": "enable_sequential_cpu_offload"}
    getattr(pipe, method[offload])(device=device.NAME)


def to_groups(pipe: Any, kind: str = "leaf_level", *, stream: bool = False, **more: Any) -> None:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(torch.device(device.NAME), offload_type=kind, use_stream=stream, **blocks, **more)


@pytest.mark.rule("model-offload-or-sequential-offload")
@pytest.mark.parametrize("order", [OFFLOADS, OFFLOADS[::-1]])
def test_of_model_and_sequential_offload_the_later_one_wins(counted: torch.device, order: tuple[str, str]) -> None:
    def taken(*offloads: str) -> int:
        pipe, call = pipelines.made("pixart")
        for offload in offloads:
            switch(pipe, offload)
        return small.peak(lambda: pipe(**call))

    assert taken(*order) == taken(order[1])
    assert taken("sequential_offload") < taken("model_offload")


@pytest.mark.rule("model-offload-or-group-offload", "sequential-offload-or-group-offload")
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stream", [True, False])
def test_groups_of_one_component_and_an_offload_of_the_others(
    counted: torch.device, offload: str, stream: bool
) -> None:
    """Whatever they hold: the calls are of the whole pipeline."""
    pipe = made()
    small.group(pipe.transformer, stream=stream)
    with pytest.raises(ValueError, match="group offloading enabled"):
        switch(pipe, offload)
    pipe = made()
    switch(pipe, offload)
    with pytest.raises(ValueError, match="alternative offloading strategy"):
        small.group(pipe.transformer, stream=stream)


@pytest.mark.rule("hooks-of-offloads-can-be-removed-and-those-of-groups-cannot")
def test_what_removes_hooks(counted: torch.device) -> None:
    pipe = made()
    switch(pipe, "model_offload")
    pipe.remove_all_hooks()
    to_groups(pipe)
    pipe.remove_all_hooks()
    with pytest.raises(ValueError, match="group offloading enabled"):
        switch(pipe, "model_offload")


@pytest.mark.rule("group-offload-twice")
def test_group_offload_twice(counted: torch.device) -> None:
    module = small.transformer()
    small.group(module, stream=True)
    with pytest.raises(ValueError, match="already exists"):
        small.group(module, stream=True)

    def taken(*kinds: str) -> int:
        module = small.transformer(blocks=4)
        plain = small.forward(module)
        for kind in kinds:
            small.group(module, kind)
        given = small.inputs(counted)
        assert small.alike(module(**given)[0].cpu(), plain)
        return small.peak(lambda: module(**given))

    for both in (("leaf_level", "block_level"), ("block_level", "leaf_level")):
        assert taken(*both) > 1.5 * taken("leaf_level")


@pytest.mark.rule("an-offload-twice-is-one")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offload_twice(counted: torch.device, offload: str) -> None:
    def taken(times: int) -> int:
        pipe, call = pipelines.made("pixart")
        for _ in range(times):
            switch(pipe, offload)
        return small.peak(lambda: pipe(**call))

    assert taken(2) == taken(1)


@pytest.mark.rule("resident-or-model-offload")
def test_moving_a_model_offloaded_pipeline_brings_all_of_it(counted: torch.device) -> None:
    pipe, call = pipelines.made("pixart")
    switch(pipe, "model_offload")
    pipe.to(counted)
    assert {p.device.type for m in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {
        device.NAME
    }
    pipe(**call)  # and after that call it is offloaded again
    assert {p.device.type for m in (pipe.transformer, pipe.vae, pipe.text_encoder) for p in m.parameters()} == {"cpu"}


@pytest.mark.rule("resident-or-sequential-offload")
def test_moving_a_sequentially_offloaded_pipeline_raises(counted: torch.device) -> None:
    pipe = made()
    switch(pipe, "sequential_offload")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        pipe.to(counted)
    with pytest.raises(ValueError, match="sequential model offloading"):
        pipe.to("cuda")


@pytest.mark.rule("resident-or-group-offload")
@pytest.mark.parametrize("stream", [True, False])
def test_moving_a_grouped_pipeline_moves_nothing(counted: torch.device, stream: bool) -> None:
    pipe = made()
    to_groups(pipe, stream=stream)
    pipe.to(counted)
    pipe.to(torch.bfloat16)
    kept = {(p.device.type, p.dtype) for m in (pipe.transformer, pipe.vae) for p in m.parameters()}
    assert kept == {("cpu", torch.float32)}


@pytest.mark.rule("a-resident-pipeline-can-be-offloaded")
@pytest.mark.parametrize("how", ["model_offload", "sequential_offload", "group_offload"])
def test_an_offload_pulls_a_moved_pipeline_back(counted: torch.device, how: str) -> None:
    pipe, call = pipelines.made("pixart")
    plain = small.draw(pipe, call)
    pipe.to(counted)
    small.apply(pipe, how)
    assert {p.device.type for p in pipe.transformer.parameters()} <= {"cpu", "meta"}
    assert small.alike(small.draw(pipe, call), plain)


@pytest.mark.rule("a-pipeline-says-in-which-order-it-offloads")
def test_components_outside_the_sequence() -> None:
    import diffusers

    assert "controlnet" not in str(diffusers.FluxControlNetPipeline.model_cpu_offload_seq)
    assert diffusers.StableDiffusionPipeline._exclude_from_cpu_offload == ["safety_checker"]
    pipe = made()
    pipe.enable_model_cpu_offload(device="cpu")
    chain = [(h.model, h.hook.prev_module_hook and h.hook.prev_module_hook.model) for h in pipe._all_hooks]
    assert chain == [(pipe.text_encoder, None), (pipe.transformer, pipe.text_encoder), (pipe.vae, pipe.transformer)]


@pytest.mark.rule("groups-know-no-exclusions")
def test_what_the_offloads_leave_on_the_device_is_grouped(counted: torch.device) -> None:
    for act, kept_on in ((lambda p: switch(p, "model_offload"), device.NAME), (to_groups, "cpu")):
        pipe = made()
        pipe.model_cpu_offload_seq, pipe._exclude_from_cpu_offload = "text_encoder->transformer", ["vae"]
        act(pipe)
        assert {p.device.type for p in pipe.vae.parameters()} == {kept_on}
    pipe = made()
    to_groups(pipe, exclude_modules=["vae"])
    assert {p.device.type for p in pipe.vae.parameters()} == {device.NAME}


@pytest.mark.rule("model-offload-needs-a-sequence")
def test_a_pipeline_without_a_sequence_is_not_offloaded() -> None:
    import diffusers

    pipe = made()
    pipe.model_cpu_offload_seq = None
    with pytest.raises(ValueError, match="model_cpu_offload_seq"):
        pipe.enable_model_cpu_offload(device="cpu")
    classes: dict[str, Any] = {n: getattr(diffusers, n, None) for n in dir(diffusers)}
    every = {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, diffusers.DiffusionPipeline)}
    without = {n for n, c in every.items() if getattr(c, "model_cpu_offload_seq", None) is None}
    assert without - {"DiffusionPipeline"} == small.listed("model-offload-needs-a-sequence")


@pytest.mark.rule("a-vae-that-encodes-stays-beside-the-denoiser")
def test_the_vae_of_an_img2img_pipeline_stays(counted: torch.device) -> None:
    def beside(name: str) -> set[str]:
        pipe, call = pipelines.made(name)
        switch(pipe, "model_offload")
        seen = set()
        pipe.unet.conv_in.register_forward_hook(lambda *_: seen.add(next(pipe.vae.parameters()).device.type))
        pipe(**call | {"num_inference_steps": 2, "output_type": "latent"})
        return seen

    assert beside("sd_img2img") == {device.NAME}
    assert beside("sd") == {"cpu"}


@pytest.mark.rule("what-ends-half-way-stays-on-the-device")
def test_an_exception_leaves_a_component_where_it_is(counted: torch.device) -> None:
    def stop(*_: Any) -> Any:
        raise KeyError("stop")

    pipe, call = pipelines.made("sd3")
    switch(pipe, "model_offload")
    with pytest.raises(KeyError):
        pipe(**call, callback_on_step_end=stop)
    assert next(pipe.transformer.parameters()).device.type == device.NAME
    pipe = made()
    switch(pipe, "model_offload")
    pipe.encode_prompt("x", device=counted, max_sequence_length=64)
    assert next(pipe.text_encoder.parameters()).device.type == device.NAME
