"""What is no number is seen, put down to the component that lost it, and said with the remedy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import cli, paths
from engine.errors import IncompatibleError
from engine.run import media, overflow
from engine.values import Step
from truth import pipelines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small(name: str) -> tuple[Any, dict[str, Any]]:
    """A small pipeline and a call of one step. In float32: the CPU takes ten times as long in float16."""
    pipe, call = pipelines.made(name)
    return pipe, call | {"output_type": "pil", "num_inference_steps": 1}


def overflowing(module: torch.nn.Module) -> None:
    """Let the first layers of a module give values that float32 does not hold."""
    for weights in list(module.parameters())[:2]:
        weights.data.fill_(3e38)


def watched(pipe: Any, call: dict[str, Any]) -> tuple[overflow.Watch, tuple[bool, ...], list[Any]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with overflow.watching(pipe) as watch:
            made = media.outputs(pipe(**call), pipe)
    assert not [s for s in said if "invalid value" in str(s.message)]
    return watch, watch.broken(len(made)), made


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_what_lost_its_numbers_is_named(name: str) -> None:
    for culprit, part in (("vae", "decoder"), ("transformer" if name == "wan" else "unet", "")):
        pipe, call = small(name)
        overflowing(getattr(pipe, culprit).get_submodule(part))
        watch, broken, _ = watched(pipe, call)
        assert (broken, watch.culprit()) == ((True,), culprit)


def test_a_text_encoder_is_named_before_the_denoiser_that_reads_it() -> None:
    pipe, call = small("sd")
    overflowing(pipe.text_encoder)
    watch, broken, _ = watched(pipe, call)
    assert (broken, watch.culprit()) == ((True,), "text_encoder")


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_a_sound_output_is_sound_and_the_same_bit_for_bit(name: str) -> None:
    pipe, call = small(name)
    call["generator"] = torch.Generator().manual_seed(0)
    plain = media.outputs(pipe(**call), pipe)
    call["generator"] = torch.Generator().manual_seed(0)
    _, broken, seen = watched(pipe, call)
    assert broken == (False,)

    def frames(made: list[Any]) -> list[Any]:
        return list(made[0].frames) if isinstance(made[0], media.Video) else made

    assert all(np.array_equal(a, b) for a, b in zip(frames(plain), frames(seen), strict=True))
    assert not any(m._forward_hooks for m in pipe.components.values() if isinstance(m, torch.nn.Module))
    assert "decode" not in vars(pipe.vae)


def test_a_picture_that_is_meant_to_be_black_is_not_broken() -> None:
    pipe, call = small("sd")
    last = pipe.vae.decoder.conv_out
    last.weight.data.zero_()
    last.bias.data.fill_(-1)
    _, broken, (made,) = watched(pipe, call)
    assert broken == (False,)
    assert np.asarray(made).max() == 0


def test_of_a_batch_only_what_is_broken_is() -> None:
    pipe, call = small("sd")
    real = pipe.vae.decode

    def decode(*args: Any, **given: Any) -> Any:
        result = real(*args, **given)
        result[0][1, 0, 3, 3] = float("nan")
        return result

    pipe.vae.decode = decode
    watch, broken, _ = watched(pipe, call | {"num_images_per_prompt": 3})
    assert broken == (False, True, False)
    assert watch.culprit() == "vae"


HALF, FULL = (Step(name="dtype", params={"value": v}) for v in ("float16", "float32"))
CASTING = Step(name="layerwise_casting", params={"storage": "float8_e4m3fn"})


@pytest.mark.parametrize(
    ("culprit", "pipe_class", "steps", "arch", "parts"),
    [
        ("vae", "FluxPipeline", [HALF], (8, 9), ["vae gave what is no number", "65,504", "--torch_dtype bfloat16"]),
        ("transformer", "FluxPipeline", [HALF], (7, 5), ["transformer", "--torch_dtype float32"]),
        ("vae", "StableDiffusionXLPipeline", [HALF], None, ["--torch_dtype bfloat16", "sdxl-vae-fp16-fix"]),
        ("unet", "StableDiffusionXLPipeline", [HALF], (8, 0), ["--torch_dtype bfloat16"]),
        ("transformer", "WanPipeline", [FULL, CASTING], None, ["float8_e4m3fn", "--forbid layerwise_casting"]),
        (None, "WanPipeline", [FULL], None, ["is no number", "damaged", "--guidance_scale"]),
    ],
)
def test_the_remedy_is_named(
    culprit: str | None, pipe_class: str, steps: list[Step], arch: tuple[int, int] | None, parts: list[str]
) -> None:
    told = overflow.error(culprit, pipe_class, steps, arch)
    assert told.exit_code == 3
    assert all(part in str(told) for part in parts)
    assert ("sdxl-vae" in told.do) == (culprit == "vae" and "XL" in pipe_class)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, its VAE such that float16 does not hold what it computes, and float32 does."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(paths.embedded_model_dir())
    pipe.vae.decoder.conv_in.weight.data.mul_(1e5)
    folder = tmp_path_factory.mktemp("narrow")
    pipe.save_pretrained(folder)
    return folder


def test_a_broken_output_is_kept_apart_and_the_run_says_what_helps(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    run = ["--model", str(narrow), "--device", "cpu", "--prompt", "a red circle", "--seed", "1", "--output", str(out)]
    run += ["--height", "32", "--width", "32", "--num_inference_steps", "1", "--call", "max_sequence_length=32"]
    assert cli.main([*run, "--torch_dtype", "float16"]) == 3
    said = capsys.readouterr()
    assert "vae gave what is no number" in said.err
    assert "--torch_dtype bfloat16" in said.err
    assert said.out.strip() == str(tmp_path / "out.broken.png")
    assert np.asarray(_opened(tmp_path / "out.broken.png")).max() == 0
    assert not out.exists()
    assert cli.main([*run, "--torch_dtype", "float32"]) == 0
    assert np.asarray(_opened(out)).max() > 0


def test_plan_run_gives_what_is_broken_and_then_raises(narrow: Path) -> None:
    asked: dict[str, Any] = {"height": 32, "width": 32, "steps": 1, "call": {"max_sequence_length": 32}}
    plan = engine.resolve(narrow, device="cpu", optimizers=[HALF], **asked)
    outputs = plan.run("a red circle", seed=1)
    assert next(outputs).size == (32, 32)
    with pytest.raises(IncompatibleError, match="vae gave what is no number"):
        next(outputs)


def _opened(path: Path) -> Any:
    from PIL import Image

    return Image.open(path)
