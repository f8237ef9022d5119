"""The command line as a person meets it: exit codes, three-part errors, nothing lost, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import cli, validation
from engine.optimizers import spec
from tests.conftest import write
from tests.test_documents import BOMB
from tests.test_profiles import GOOD

PROMPT = ["--prompt", "a red circle on a blue background"]
pytestmark = pytest.mark.usefixtures("no_card")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of a command line."""
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Return what a command line that must be refused says."""
    found, out, err = run(capsys, *arguments)
    assert found == code, err
    assert out == ""
    assert err.startswith("dg-run: ")
    assert "Traceback" not in err
    return err


USAGE = {
    "no prompt": (["--auto"], "there is no --prompt"),
    "empty prompt": (["--auto", "--prompt", "  "], "the prompt is empty"),
    "unknown option": (["--auto", "--promt", "x"], "did you mean '--prompt'?"),
    "unknown option with hyphens": (["--auto", *PROMPT, "--host-rom", "1GiB"], "did you mean '--host_ram'?"),
    "unknown command": (["plann"], "did you mean 'plan'?"),
    "stray argument": (["--auto", *PROMPT, "stray"], "has no argument 'stray'"),
    "zero height": (["--auto", *PROMPT, "--height", "0"], "height is 0"),
    "negative width": (["--auto", *PROMPT, "--width", "-64"], "width is -64"),
    "huge height": (["--auto", *PROMPT, "--height", "1000000"], "between 1 and 16,384"),
    "enormous number": (["--auto", *PROMPT, "--height", "9" * 5000], "is not a whole number"),
    "not a number": (["--auto", *PROMPT, "--height", "tall"], "'tall' is not a whole number"),
    "bad multiple": (["--auto", *PROMPT, "--height", "100", "--width", "100"], "height: 96 or 112"),
    "seed below": (["--auto", *PROMPT, "--seed", "-1"], "the seed is -1"),
    "seed above": (["--auto", *PROMPT, "--seed", str(2**32)], "between 0 and 4294967295"),
    "text that is not UTF-8": (["--auto", "--prompt", "\udcff"], "is not text in UTF-8"),
    "half a character": (["plan", "--call", 'x="\\ud800"'], "is no plain value"),
    "not a finite number": (["plan", "--call", "x=NaN"], "is no plain value"),
    "bad call": (["--auto", *PROMPT, "--call", "steps"], "is not NAME=VALUE"),
    "bad size": (["--auto", *PROMPT, "--vram", "lots"], "'lots' is not a size"),
    "card that is not here": (
        ["--auto", *PROMPT, "--gpu", "RTX 4090"],
        "for a card that is not here (GeForce RTX 4090)",
    ),
    "more memory than is here": (["--auto", *PROMPT, "--vram", "24GiB"], "the plan is for a card that is not here"),
    "card that nobody knows": (["--auto", *PROMPT, "--gpu", "Voodoo 9"], "here or in the table of known cards"),
    "profile without auto": ([*PROMPT, "--profile", "low"], "--profile guides a choice"),
    "cards without xdit": ([*PROMPT, "--num_gpus", "2"], "needs --backend xdit"),
    "auto and exact": (["plan", "--auto", "--exact"], "contradict each other"),
    "unknown required": (["--auto", *PROMPT, "--require", "tiling"], "there is no optimizer 'tiling'"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors(capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments, part = USAGE[name]
    assert part in refused(capsys, 2, *arguments)


OTHERS: dict[str, tuple[int, list[str], str]] = {
    "unknown profile": (3, ["--auto", *PROMPT, "--profile", "lwo"], "did you mean 'low'?"),
    "two placements": (
        3,
        [*PROMPT, "--enable_cpu_offload", "--enable_sequential_cpu_offload"],
        "model_offload and sequential_offload cannot be combined",
    ),
    "two placements, auto": (
        3,
        ["--auto", *PROMPT, "--enable-cpu-offload", "--enable-group-offloading"],
        "model_offload and group_offload cannot be combined",
    ),
    "xdit": (3, [*PROMPT, "--backend", "xdit"], "does not start its processes yet"),
    "xdit and offload": (
        3,
        [*PROMPT, "--backend", "xdit", "--enable_cpu_offload"],
        "xdit and model_offload cannot be combined",
    ),
    "vram of no card": (2, ["--auto", *PROMPT, "--vram", "1GiB"], "a card that is not here"),
    "no card": (6, ["--auto", *PROMPT, "--device", "cuda"], "there is no card"),
    "unknown model": (
        5,
        ["--auto", *PROMPT, "--model", "black-forest-labs/FLUX1-dev"],
        "did you mean black-forest-labs/FLUX.1-dev",
    ),
    "model that is a file": (5, ["--auto", *PROMPT, "--model", __file__], "single-file checkpoints are not read"),
    "output of another kind": (8, ["--auto", *PROMPT, "--output", "p.jpg"], "pictures are written as PNG"),
    "output in a file": (8, ["--auto", *PROMPT, "--output", f"{__file__}/p.png"], "cannot be written"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, arguments, part = OTHERS[name]
    found, out, err = run(capsys, *arguments)
    assert found == code, err
    assert part in err
    assert out == ""
    assert "Traceback" not in err
    assert "\n  do:  " in err or "  why: " in err


def test_a_bad_place_is_refused_before_torch_is_even_loaded() -> None:
    code = (
        "import sys; from engine.cli import main; "
        "rc = main(['--auto', '--device', 'cpu', '--prompt', 'x', '--output', '/proc/p.png']); "
        "print(rc, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "False"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GOOD.replace("vae_tiling", "vae_tilling"), "team.yaml:9:5: 'vae_tilling' is not known here"),
        ("a: [", "team.yaml:1:"),
        (BOMB, "values once its aliases are followed"),
        ("\x00", "is not allowed in YAML"),
    ],
)
@pytest.mark.parametrize("command", [["--auto", *PROMPT, "--profile"], ["plan", "--profile"], ["profiles", "show"]])
def test_a_bad_profile(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, part: str, command: list[str]
) -> None:
    assert part in refused(capsys, 3, *command, str(write(tmp_path, "team.yaml", text)))


def test_a_good_profile_of_a_team(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = write(tmp_path, "team.yaml", GOOD)
    code, out, _ = run(capsys, "plan", "--profile", str(path))
    assert code == 0
    assert f"team 1.2.3 ({path})" in out
    code, out, _ = run(capsys, "profiles", "show", str(path))
    assert (code, out.splitlines()[1:]) == (0, GOOD.splitlines())


def test_plan_as_json_obeys_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "--json", "--model", "black-forest-labs/FLUX.1-dev", "--vram", "24GiB")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    jsonschema.Draft202012Validator(json.loads(validation.schema_text("plan"))).validate(plan)
    assert plan["fits"] is None


def test_a_command_line_becomes_its_plan_by_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--auto", *PROMPT, "--seed", "7", "--output", "p.png", "--enable-vae-tiling"]
    code, out, _ = run(capsys, "plan", *words)
    assert code == 0
    assert "vae_tiling" in out


def test_plan_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "--vram", "2GiB")
    assert code == 4
    assert "extreme-low: it wants 5.40 GiB of free VRAM, 2.00 GiB are free: 3.40 GiB short" in out


def steps_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    code, out, err = run(capsys, "plan", "--exact", "--json", *arguments)
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)["optimizers"]
    return found


FLAGS = {
    "--torch_dtype float16": ("dtype", {"value": "float16"}),
    "--enable_vae_slicing": ("vae_slicing", {}),
    "--enable_vae_tiling": ("vae_tiling", {}),
    "--enable_cpu_offload": ("model_offload", {}),
    "--enable_sequential_cpu_offload": ("sequential_offload", {}),
    "--enable_group_offloading": ("group_offload", {"type": "leaf_level", "use_stream": True, "blocks_per_group": 1}),
    "--enable_layerwise_casting": ("layerwise_casting", {"storage": "float8_e4m3fn", "compute": "auto"}),
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("hyphens", [False, True])
def test_the_guides_flags(capsys: pytest.CaptureFixture[str], flag: str, hyphens: bool) -> None:
    name, params = FLAGS[flag]
    option, *value = flag.split()
    option = "--" + option[2:].replace("_", "-") if hyphens else option
    assert {"name": name, "params": params} in steps_of(capsys, option, *value)


def test_model_name_is_model(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "--json", "--model_name", "stabilityai/sdxl-turbo", "--vram=12GiB")
    assert json.loads(out)["request"]["model"] == "stabilityai/sdxl-turbo"


def test_the_guides_environment_variables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_GROUP_OFFLOAD_TYPE", "block_level")
    monkeypatch.setenv("DG_STORAGE_DTYPE", "float8_e5m2")
    monkeypatch.setenv("DG_COMPUTE_DTYPE", "bfloat16")
    listed = steps_of(capsys, "--enable_group_offloading", "--enable_layerwise_casting", "--torch_dtype", "bfloat16")
    params = {s["name"]: s["params"] for s in listed}
    assert params["group_offload"]["type"] == "block_level"
    assert params["layerwise_casting"] == {"storage": "float8_e5m2", "compute": "bfloat16"}


@pytest.mark.parametrize(
    ("variable", "value", "flag", "part"),
    [
        ("DG_GROUP_OFFLOAD_TYPE", "leaflevel", "--enable_group_offloading", "did you mean 'leaf_level'?"),
        ("DG_STORAGE_DTYPE", "fp8", "--enable_layerwise_casting", "DG_STORAGE_DTYPE cannot be 'fp8'"),
        ("DG_XDIT_RING_DEGREE", "two", "--backend=xdit", "DG_XDIT_RING_DEGREE cannot be 'two'"),
        ("DG_XDIT_USE_CFG_PARALLEL", "maybe", "--backend=xdit", "give true or false"),
    ],
)
def test_a_bad_environment_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, flag: str, part: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert part in refused(capsys, 2, "plan", "--exact", flag)


def test_the_degrees_of_xdit_must_agree_with_the_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DG_XDIT_ULYSSES_DEGREE", "2")
    monkeypatch.setenv("DG_XDIT_USE_CFG_PARALLEL", "1")
    assert "the degrees multiply to 4" in refused(capsys, 3, "plan", "--exact", "--backend", "xdit", "--num_gpus", "2")


def test_help_lists_every_option_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in (
        "--auto",
        "--prompt",
        "--enable_cpu_offload",
        "--profile",
        "dg-run plan",
        "dg-run doctor",
        "dg-run profiles",
    ):
        assert word in out


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "usage: dg-run" in err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("torch", "diffusers", "host RAM", "embedded", "hub cache"):
        assert word in out
    code, out, _ = run(capsys, "doctor", "--json")
    said = json.loads(out)
    assert set(said) == {"dg-run", "hardware", "versions", "findings"}
    assert said["hardware"]["host"]["cores"] == 8
    assert str(Path.home()) not in out


def test_doctor_notes_versions_outside_the_tested_range(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    have = {"torch": "2.99.1+cu130", "diffusers": "0.30.0", "transformers": None, "accelerate": "1.15.7"}
    monkeypatch.setattr("engine.versions.installed", lambda name: have.get(name, "1.0"))
    code, out, _ = run(capsys, "doctor")
    assert code == 6
    lines = {line[2:].split()[0]: line for line in out.splitlines() if line[2:].strip()}
    assert "newer than what is tested" in lines["torch"]
    assert "older than what is tested" in lines["diffusers"]
    assert "not installed: pip install 'transformers>=5.23,<5.24'" in lines["transformers"]
    assert lines["accelerate"].endswith("1.15.7 tested")


def test_profiles_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "profiles", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line[:1].strip()] == [
        "extreme-low",
        "low",
        "hi-res",
        "medium",
        "max",
        "cpu",
    ]
    code, out, _ = run(capsys, "profiles", "show", "low")
    assert code == 0
    assert "  - model_offload" in out
    assert "did you mean 'list'?" in refused(capsys, 2, "profiles", "lisst")
    assert "are required: NAME|FILE" in refused(capsys, 2, "profiles", "show")


def test_an_internal_error_is_a_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("engine.resolve", broken, raising=False)
    assert "an internal error: ZeroDivisionError: oops" in refused(capsys, 1, "plan")
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "--debug"])


def generate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", "--auto", "--device", "cpu", *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)


def test_the_main_job_twice_gives_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, and in this one."""
    from PIL import Image

    prompt = ["--prompt", "a yellow triangle on a black background, on the left", "--seed", "7"]
    first = generate(*prompt, "--output", "a.png", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--auto", "--device", "cpu", *prompt, "--output", "b.png"]) == 0
    assert first.stdout == "a.png\n"
    one, two = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert one.tobytes() == two.tobytes()
    assert one.size == (128, 128)
    assert one.text["seed"] == "7"  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "dg-run.jsonl"]
    for noise in ("Warning", "warning", "%|", "torchvision"):
        assert noise not in first.stderr


def test_a_prompt_outside_the_embedded_models_world_is_said_to_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--auto", "--device", "cpu", "--prompt", "a cat on a sofa", "--num_inference_steps", "1")
    code, _, err = run(capsys, *words, "--output", "cat.png")
    assert code == 0
    assert "it does not\n      know 'cat' and 'sofa'" in err


@pytest.mark.parametrize("delay_s", [0.5, 4.0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1.0, 1.5, 2.0))])
def test_ctrl_c_exits_130_and_leaves_no_partial_file(tmp_path: Path, delay_s: float) -> None:
    command = [
        sys.executable,
        "-m",
        "engine",
        "--auto",
        "--device",
        "cpu",
        *PROMPT,
        "--num_inference_steps",
        "5000",
        "--output",
        "p.png",
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_interrupted_tidies_up_and_ends_with_130() -> None:
    code = (
        "import atexit, signal; from engine import cli; atexit.register(print, 'tidied'); "
        "cli._command = lambda _: lambda _: signal.raise_signal(signal.SIGINT); cli.entry()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "tidied\n")
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_every_optimizer_of_the_guide_has_a_flag() -> None:
    flagged = {name for name, _ in FLAGS.values()}
    assert flagged == {
        "dtype",
        "vae_slicing",
        "vae_tiling",
        "model_offload",
        "sequential_offload",
        "group_offload",
        "layerwise_casting",
    }
    assert all(spec(name).summary for name in flagged)
