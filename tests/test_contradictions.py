"""Of two flags, or arguments, of which only one can be meant, both are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import engine
from engine import cli
from engine.errors import DgRunError, IncompatibleError, UsageError
from tests.conftest import card, machine

pytestmark = pytest.mark.usefixtures("no_card", "no_estimates")
PROMPT = ["--prompt", "a red circle"]
RUN = ["--auto", *PROMPT]

FLAGS: dict[str, tuple[int, list[str], list[str]]] = {
    # exit code, the command line, what is named
    "auto, exact": (2, ["plan", "--auto", "--exact"], ["--auto", "--exact"]),
    "auto, force": (2, [*RUN, "--force"], ["--force", "--auto"]),
    "require, forbid": (
        3,
        ["plan", "--require", "vae_tiling", "--forbid", "vae_tiling"],
        ["--require vae_tiling", "--forbid vae_tiling"],
    ),
    "flag, forbid": (
        3,
        ["plan", "--enable-vae-tiling", "--forbid", "vae_tiling"],
        ["--enable_vae_tiling", "--forbid vae_tiling"],
    ),
    "dtype, forbid": (
        3,
        ["plan", "--torch_dtype", "float16", "--forbid", "dtype"],
        ["--torch_dtype", "--forbid dtype"],
    ),
    "two placements": (
        3,
        ["plan", "--enable_cpu_offload", "--enable_group_offloading"],
        ["--enable_cpu_offload", "--enable_group_offloading", "model_offload and group_offload"],
    ),
    "two placements, exact": (
        3,
        [*PROMPT, "--enable_sequential_cpu_offload", "--enable_group_offloading"],
        ["--enable_sequential_cpu_offload", "--enable_group_offloading"],
    ),
    "flag, require": (
        3,
        ["plan", "--enable_cpu_offload", "--require", "resident"],
        ["--enable_cpu_offload", "--require resident"],
    ),
    "backend, offload": (
        3,
        ["plan", "--backend", "xdit", "--enable_cpu_offload"],
        ["--backend xdit", "--enable_cpu_offload"],
    ),
    "quality": (
        2,
        ["plan", "--quality", "exact", "--enable_layerwise_casting"],
        ["--quality exact", "--enable_layerwise_casting"],
    ),
    "quality, require": (
        2,
        [*RUN, "--quality=exact", "--require=vae_tiling"],
        ["--quality exact", "--require vae_tiling"],
    ),
    "quality, exact list": (2, ["plan", "--exact", "--quality", "near"], ["--quality", "--exact"]),
    "prefer, exact list": (2, [*PROMPT, "--prefer", "speed"], ["--prefer", "--auto"]),
    "profile, exact list": (2, ["plan", "--exact", "--profile", "low"], ["--profile", "--exact"]),
    "cpu, gpu": (2, ["plan", "--device", "cpu", "--gpu", "RTX 4090"], ["--device cpu", "--gpu"]),
    "cpu, vram": (2, [*RUN, "--device", "cpu", "--vram", "8GiB"], ["--device cpu", "--vram"]),
    "negative prompt": (
        2,
        ["plan", "--negative_prompt", "dark", "--call", "negative_prompt=bright"],
        ["--negative_prompt", "--call negative_prompt=bright"],
    ),
    "call, call": (2, ["plan", "--call", "a=1", "--call", "a=2"], ["--call a=1", "--call a=2"]),
    "height, call": (2, ["plan", "--height", "64", "--call", "height=128"], ["height 64", "height 128 in the call"]),
    "steps, call": (
        2,
        ["plan", "--num_inference_steps", "4", "--call", "num_inference_steps=8"],
        ["steps 4", "num_inference_steps 8"],
    ),
    "requests, lock": (2, ["plan", "--requests", "x.jsonl", "--lock", "x.yaml"], ["--requests", "--lock"]),
    "requests, default": (2, ["plan", "--requests", "x.jsonl", "--quality", "near"], ["--requests", "--quality"]),
    "check, lock": (2, ["plan", "--check", "x.yaml", "--lock", "y.yaml"], ["--check", "--lock"]),
    "like, plan": (2, ["--like", "x.png", "--plan", "x.yaml"], ["--like", "--plan"]),
    "like, size": (2, ["--like", "x.png", "--height", "64"], ["--like", "--height"]),
    "prompt, prompts": (2, ["--auto", *PROMPT, "--prompts", "x.txt"], ["--prompt", "--prompts"]),
    "check, model": (2, ["plan", "--check", "x.yaml", "--model-name", "x"], ["--check", "--model_name"]),
    "check, timeline": (2, ["plan", "--check", "x.yaml", "--timeline", "x.svg"], ["--check", "--timeline"]),
    "check, requests": (2, ["plan", "--check", "x.yaml", "--requests", "x.jsonl"], ["--check", "--requests"]),
}
BESIDE_PLAN = {
    "--auto": [],
    "--model": ["x"],
    "--lora": ["x"],
    "--height": ["64"],
    "--width": ["64"],
    "--batch_size": ["1"],
    "--num_frames": ["1"],
    "--num_inference_steps": ["8"],
    "--guidance_scale": ["1"],
    "--negative_prompt": ["x"],
    "--strength": ["0.5"],
    "--call": ["a=1"],
    "--device": ["cpu"],
    "--gpu": ["0"],
    "--vram": ["8GiB"],
    "--host_ram": ["8GiB"],
    "--headroom": ["1GiB"],
    "--torch_dtype": ["auto"],
    "--enable_vae_slicing": [],
    "--enable_vae_tiling": [],
    "--enable_cpu_offload": [],
    "--enable_sequential_cpu_offload": [],
    "--enable_group_offloading": [],
    "--enable_layerwise_casting": [],
    "--backend": ["diffusers"],
    "--num_gpus": ["1"],
    "--profile": ["low"],
    "--require": ["vae_tiling"],
    "--forbid": ["vae_tiling"],
    "--quality": ["near"],
    "--prefer": ["speed"],
    "--force": [],
}


@pytest.mark.parametrize("name", FLAGS)
def test_two_flags_of_which_one_can_be_meant(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, arguments, named = FLAGS[name]
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert all(part in said.err for part in named), said.err
    assert "\n  do:  " in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize("flag", BESIDE_PLAN)
def test_what_would_change_a_locked_plan_is_refused_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str
) -> None:
    path = tmp_path / "plan.yaml"
    engine.resolve(device="cpu").lock(path)
    assert cli.main(["--plan", str(path), *PROMPT, flag, *BESIDE_PLAN[flag]]) == 2
    said = capsys.readouterr()
    assert f"--plan and {flag} contradict each other" in said.err
    assert said.out == ""


def test_every_option_is_allowed_beside_a_locked_plan_or_refused() -> None:
    from engine.cli import generate

    known = {a.option_strings[0] for a in generate.parser()._actions} - {"-h", "--version"}
    job = {"--prompt", "--prompts", "--image", "--num_images", "--seed", "--output", "--preview", "--debug"}
    assert known == {*BESIDE_PLAN, "--plan", "--like"} | job


ARGUMENTS: dict[str, tuple[type[DgRunError], dict[str, Any], str]] = {
    "profile, list": (UsageError, {"profile": "low", "optimizers": ["vae_tiling"]}, "a profile and an exact list"),
    "require, list": (UsageError, {"require": ["dtype"], "optimizers": ["vae_tiling"]}, "optimizers and require"),
    "forbid, list": (UsageError, {"forbid": ["dtype"], "optimizers": ["vae_tiling"]}, "optimizers and forbid"),
    "require, forbid": (
        IncompatibleError,
        {"require": ["vae_tiling"], "forbid": ["vae_tiling"]},
        "vae_tiling cannot be required and forbidden",
    ),
    "quality, require": (
        UsageError,
        {"quality": "exact", "require": ["layerwise_casting"]},
        "layerwise_casting and quality 'exact' contradict each other",
    ),
    "quality, list": (
        UsageError,
        {"quality": "exact", "optimizers": ["vae_tiling"]},
        "vae_tiling and quality 'exact' contradict each other",
    ),
    "cpu, gpu": (UsageError, {"device": "cpu", "gpu": 0}, "device 'cpu' and gpu"),
    "cpu, vram": (UsageError, {"device": "cpu", "vram": "8GiB"}, "device 'cpu' and vram"),
    "width, call": (UsageError, {"width": 64, "call": {"width": 128}}, "width 64 and width 128 in the call"),
    "guidance, call": (
        UsageError,
        {"guidance": 2.0, "call": {"guidance_scale": 3.0}},
        "guidance 2.0 and guidance_scale 3.0 in the call",
    ),
    "two placements": (
        IncompatibleError,
        {"require": ["model_offload", "group_offload"]},
        "model_offload and group_offload cannot be combined",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_two_arguments_of_which_one_can_be_meant(name: str) -> None:
    kind, arguments, part = ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        engine.resolve(hardware=machine(card()), **arguments)
    assert part in caught.value.what
    assert caught.value.do


def test_what_says_the_same_twice_is_no_contradiction(capsys: pytest.CaptureFixture[str]) -> None:
    engine.resolve(hardware=machine(card()), height=128, call={"height": 128}, quality="near", require=["vae_tiling"])
    assert cli.main(["plan", "--call", "a=1", "--call", "a=1", "--quality", "near", "--enable_vae_tiling"]) == 0
    assert cli.main(["plan", "--enable_vae_tiling", "--require", "vae_tiling", "--device", "cpu"]) == 0
