"""LoRAs: what is refused by a file's header, and that a fused one draws what an active one does, and leaves nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import engine
from engine import cli, facts
from engine.errors import DgRunError, FileError, ModelError, UsageError
from engine.facts import loras
from engine.optimizers import staged_encoding
from engine.optimizers.spec import Context
from engine.run import fuse, load, media, parts, staged
from engine.run.progress import Quiet
from tests.conftest import draw, machine
from truth import device
from truth.cases import PLACEMENTS

SIZES: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}
HERE = Context(device="cpu", dtype="float32")


def made_lora(modules: dict[str, Any], path: Path, seed: int = 0, **metadata: Any) -> Path:
    """Write a random LoRA of rank 4 for the attention of these components, by name."""
    noise = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    ends = ("to_q", "to_k", "to_out.0", "proj_mlp", "q_proj", "v_proj")
    for component, module in modules.items():
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear) and name.endswith(ends):
                down = torch.randn(4, layer.in_features, generator=noise) / 8
                up = torch.randn(layer.out_features, 4, generator=noise) / 8
                weights |= {f"{component}.{name}.lora_A.weight": down, f"{component}.{name}.lora_B.weight": up}
    about = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file(weights, path, metadata=about)
    return path


@pytest.fixture(scope="module")
def twins() -> dict[str, Any]:
    return parts.twins(facts.find(None), "float32")


@pytest.fixture(scope="module")
def lora(twins: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    return made_lora({n: twins[n] for n in ("transformer", "text_encoder")}, folder / "scene.safetensors")


def plan_with(*given: Any, **more: Any) -> engine.Plan:
    return engine.resolve(hardware=machine(), loras=given, **SIZES, **more)


def in_float32(plan: engine.Plan) -> engine.Plan:
    return dataclasses.replace(plan, optimizers=tuple(s for s in plan.optimizers if s.name != "dtype"))


@pytest.fixture(scope="module")
def plain() -> Any:
    """What is drawn without a LoRA."""
    return draw(in_float32(plan_with()).load(), height=64, width=64)


@pytest.fixture(scope="module")
def active(lora: Path) -> Any:
    """What is drawn with the LoRA beside the weights, as the library does it, at weight 0.7."""
    pytest.importorskip("peft")
    pipe = in_float32(plan_with()).load()
    pipe.load_lora_weights(str(lora), adapter_name="scene")
    pipe.set_adapters(["scene"], adapter_weights=[0.7])
    return draw(pipe, height=64, width=64)


def near(one: Any, other: Any) -> bool:
    return int(np.abs(one.astype(int) - other).max()) <= 2


def test_a_fused_lora_draws_what_an_active_one_draws_twice_in_a_row(lora: Path, plain: Any, active: Any) -> None:
    pipe = in_float32(plan_with(f"{lora}:0.7")).load()
    for _ in range(2):
        drawn = draw(pipe, height=64, width=64)
        assert near(drawn, active) and not near(drawn, plain)
    for module in (pipe.transformer, pipe.text_encoder):
        assert not any("lora" in n for n, _ in module.named_parameters())


def test_what_is_fused_is_the_weight_and_weight_times_the_product(lora: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(lora)
    before, after = in_float32(plan_with()).load(), in_float32(plan_with((lora, 0.5))).load()
    layer = "transformer_blocks.0.attn.to_q"
    product = state[f"transformer.{layer}.lora_B.weight"] @ state[f"transformer.{layer}.lora_A.weight"]
    was, now = (p.transformer.get_submodule(layer).weight for p in (before, after))
    assert torch.allclose(now, was + 0.5 * product, atol=1e-6)
    same = "transformer_blocks.0.attn.to_v"
    assert torch.equal(*(p.transformer.get_submodule(same).weight for p in (before, after)))


def test_two_loras_add_up_and_the_alphas_of_a_file_count(twins: dict[str, Any], tmp_path: Path) -> None:
    first = made_lora({"transformer": twins["transformer"]}, tmp_path / "first.safetensors")
    half = {"transformer.lora_alpha": 2, "transformer.r": 4}
    second = made_lora({"transformer": twins["transformer"]}, tmp_path / "second.safetensors", **half)
    together = in_float32(plan_with(first, (second, 2.0))).load()
    once = in_float32(plan_with((first, 2.0))).load()
    layer = "transformer_blocks.0.attn.to_q"
    one, other = (p.transformer.get_submodule(layer).weight for p in (together, once))
    assert torch.allclose(one, other, atol=1e-6)


def test_a_staged_run_fuses_each_component_in_its_own_stage(lora: Path, active: Any) -> None:
    plan = in_float32(plan_with(f"{lora}:0.7"))
    steps = (staged_encoding.SPEC.step(), *plan.optimizers)
    call = {"prompt": "a red circle on a blue background", "max_sequence_length": 32, "num_inference_steps": 2}

    def wanted(pipe: Any) -> Iterator[Any]:
        yield dict(call, height=64, width=64, generator=torch.Generator().manual_seed(0))

    with load.opened(plan, Quiet()) as source:
        whole = source.parts()
        first = staged.first(whole, steps, wanted, HERE, Quiet())
        pipe = staged.second(whole, steps, first, HERE, Quiet())
    from engine.run import stages

    with stages.given(pipe, first.encoded[0], "cpu"):
        (drawn,) = [np.stack([np.asarray(i) for i in pipe(**c).images]) for c in wanted(pipe)]
    assert near(drawn, active)


def test_it_is_part_of_what_is_run_by_its_content_and_not_by_its_place(lora: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(lora.read_bytes())
    plan, elsewhere = plan_with(lora), plan_with(copy)
    assert plan.digest == elsewhere.digest != plan_with().digest
    assert plan_with((lora, 0.5)).digest != plan.digest
    assert plan.request.loras[0].components == ("text_encoder", "text_encoder_2", "transformer")
    assert engine.Plan.from_json(plan.to_json()) == plan
    assert "with the LoRA scene.safetensors at 1" in plan.explain()


def test_a_file_that_changed_since_it_was_planned_is_refused(twins: dict[str, Any], tmp_path: Path) -> None:
    path = made_lora({"transformer": twins["transformer"]}, tmp_path / "it.safetensors")
    plan = plan_with(path)
    made_lora({"transformer": twins["transformer"]}, path, seed=1)
    with pytest.raises(FileError, match="is not the one that was planned"):
        plan.load()
    path.unlink()
    with pytest.raises(FileError, match="there is no LoRA"):
        plan.load()


def test_its_host_memory_is_no_page_of_a_file(lora: Path) -> None:
    from tests.conftest import card

    def host(*given: Any) -> Any:
        steps: list[Any] = [{"name": "dtype", "params": {"value": "float16"}}, "model_offload"]
        return engine.resolve(hardware=machine(card()), loras=given, optimizers=steps).estimate.host

    without, fused = host(), host(lora)
    assert None not in (without.anonymous_bytes, fused.anonymous_bytes)
    assert fused.anonymous_bytes + fused.file_bytes == without.anonymous_bytes + without.file_bytes
    assert fused.file_bytes < without.file_bytes or without.file_bytes == 0


def test_a_loaded_pipeline_is_too_late(lora: Path) -> None:
    with pytest.raises(engine.IncompatibleError, match="fuses LoRAs while it loads"):
        plan_with(lora).apply(object())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _scrambled(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[8:40] = b"\xff" * 32
    path.write_bytes(body)


def _not_one(path: Path) -> None:
    save_file({"vae.decoder.weight": torch.zeros(2)}, path)


def _empty(path: Path) -> None:
    save_file({}, path)


def _dora(path: Path) -> None:
    save_file({"transformer.a.lora_A.weight": torch.zeros(4, 2), "transformer.a.dora_scale": torch.zeros(2)}, path)


def _pickle(path: Path) -> None:
    torch.save({}, path)


def _unet(path: Path) -> None:
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({f"{key}.lora_A.weight": torch.zeros(4, 2048), f"{key}.lora_B.weight": torch.zeros(640, 4)}, path)


REFUSED: dict[str, tuple[Callable[[Path], None], type[DgRunError], str]] = {
    "cut": (_cut, FileError, "is damaged"),
    "scrambled": (_scrambled, FileError, "damaged header"),
    "not one": (_not_one, FileError, "is not a LoRA"),
    "empty": (_empty, FileError, "is empty"),
    "dora": (_dora, FileError, "is a DoRA"),
    "pickle": (_pickle, FileError, "damaged, or not in safetensors"),
    "unet": (_unet, ModelError, "seems to be for Stable Diffusion XL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_is_refused_by_its_header_before_anything_is_planned(
    name: str, lora: Path, tmp_path: Path
) -> None:
    spoil, error, words = REFUSED[name]
    path = tmp_path / "it.safetensors"
    path.write_bytes(lora.read_bytes())
    spoil(path)
    with pytest.raises(error, match=words):
        loras.read([path], facts.find(None))


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e9", "0", "-11"])
def test_a_weight_that_cannot_be_meant(lora: Path, weight: str) -> None:
    with pytest.raises(UsageError, match="weight cannot be"):
        plan_with(f"{lora}:{weight}")


@pytest.mark.parametrize(
    ("given", "found"),
    [("a.safetensors", ("a.safetensors", 1.0)), ("C:\\a.safetensors:-0.5", ("C:\\a.safetensors", -0.5))],
)
def test_how_a_weight_is_written(given: str, found: tuple[str, float]) -> None:
    assert loras.asked(given) == found


def test_a_folder_is_the_one_lora_in_it(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no LoRA"):
        loras.located(str(tmp_path))
    (tmp_path / "one.safetensors").write_bytes(lora.read_bytes())
    assert loras.located(str(tmp_path)).name == "one.safetensors"
    (tmp_path / "two.safetensors").write_bytes(lora.read_bytes())
    with pytest.raises(FileError, match="holds 2 LoRAs"):
        loras.located(str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter.bin").write_bytes(b"pickle")
    with pytest.raises(FileError, match="not in safetensors"):
        loras.located(str(tmp_path / "old"))


def test_one_of_the_hub_is_refused_by_name_offline() -> None:
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        loras.located("somebody/scenes/scene.safetensors")


def _refused_by_twins(path: Path, twins: dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    from diffusers import DiffusionPipeline

    plan = plan_with(path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match=words):
        plan.load()


def test_shapes_of_another_size_are_refused_before_anything_is_loaded(
    twins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, path = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "big.safetensors"
    save_file({f"{key}.lora_A.weight": torch.zeros(4, 3072), f"{key}.lora_B.weight": torch.zeros(3072, 4)}, path)
    _refused_by_twins(path, twins, monkeypatch, r"for a weight of \(3072, 3072\)")


def test_layers_that_the_model_does_not_have_are_refused_before_anything_is_loaded(
    twins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, path = "transformer.transformer_blocks.57.attn.to_q", tmp_path / "deep.safetensors"
    save_file({f"{key}.lora_A.weight": torch.zeros(4, 3072), f"{key}.lora_B.weight": torch.zeros(3072, 4)}, path)
    _refused_by_twins(path, twins, monkeypatch, "the model has no layer transformer_blocks.57")


def test_numbers_that_are_none_are_refused_before_anything_is_loaded(
    twins: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made_lora({"transformer": twins["transformer"]}, tmp_path / "nan.safetensors")
    from safetensors.torch import load_file

    state = load_file(path)
    state[next(iter(state))].fill_(float("nan"))
    save_file(state, path)
    _refused_by_twins(path, twins, monkeypatch, "holds what is no number")


def test_a_wrong_sum_is_seen(twins: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    module = torch.nn.Sequential(layer)
    added = {"0": [fuse.Added(torch.ones(8, 2), torch.ones(2, 8), 0.5)]}
    monkeypatch.setattr(fuse, "_add", lambda weight, _: weight.data.add_(0.9))
    with pytest.raises(DgRunError, match="from its weight and what the LoRA adds"):
        fuse._fused("transformer", module, added)
    monkeypatch.undo()
    assert "1 layers of transformer" in fuse._fused("transformer", module, added)


def test_a_lock_holds_the_content_of_its_loras(lora: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(lora.read_bytes())
    plan = engine.resolve(hardware=machine(), loras=[(own, 0.5)], device="cpu")
    locked = plan.lock(tmp_path / "lock.yaml")
    assert engine.read_lock(tmp_path / "lock.yaml") == locked
    assert locked.plan(machine()).request.loras == plan.request.loras
    assert locked.plan(machine()).digest == plan.digest
    _scale(own)
    (drift,) = [d for d in locked.drift(machine()) if d.name.startswith("LoRA")]
    assert (drift.severity, drift.old) == ("refuse", plan.request.loras[0].sha256[:12])
    with pytest.raises(FileError, match="LoRA"):
        locked.plan(machine())


def _scale(path: Path) -> None:
    from safetensors.torch import load_file

    save_file({n: 2 * w for n, w in load_file(path).items()}, path)


needs_device = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


@needs_device
@pytest.mark.parametrize("name", ["resident", "model_offload", "sequential_offload", "leaf, streamed", "block"])
def test_under_every_placement_it_draws_the_same_twice_in_a_row(name: str, lora: Path, active: Any) -> None:
    """On the counted device, with the libraries' own hooks. The weights of a LoRA are not among what is on it."""
    device.load()
    plan = in_float32(plan_with(f"{lora}:0.7"))
    with load.opened(plan, Quiet()) as source:
        whole = source.parts()
        here = Context(device=device.NAME, dtype="float32")
        pipe = load.made(whole, list(whole.twins), (PLACEMENTS[name],), {}, here, Quiet())
    for _ in range(2):
        assert near(draw(pipe, height=64, width=64), active)
    pipe.maybe_free_model_hooks()


def test_an_output_whose_lora_is_gone_is_not_made_again(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = tmp_path / "own.safetensors", tmp_path / "out.png"
    own.write_bytes(lora.read_bytes())
    plan = engine.resolve(hardware=machine(), loras=[own], device="cpu")
    record = {"dg-run": plan.to_json(), "prompt": "a red circle", "seed": "1"}
    media.write(Image.new("RGB", (8, 8)), out, record)
    own.unlink()
    assert cli.main(["show", str(out)]) == 0
    assert "LoRA       own.safetensors at 1" in capsys.readouterr().out
    assert cli.main(["--like", str(out)]) == 8
    err = capsys.readouterr().err
    assert f"{out} cannot be made again here" in err and "there is no LoRA" in err and "--lock" not in err
