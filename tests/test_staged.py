"""Runs in two stages, and components that are on the device before the next one comes: real loading, real calls."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine
from engine import cli, optimizers, prompts
from engine.dryrun import record
from engine.errors import IncompatibleError, OutOfMemoryError, UsageError
from engine.estimate import whole
from engine.estimate.bounds import HOST_BASE_BYTES
from engine.estimate.trace import Builder, TracedComponent
from engine.optimizers import staged_encoding
from engine.optimizers.spec import Context, NotApplied
from engine.plan import Plan
from engine.run import device as run_device
from engine.run import items, runner, staged, stages
from engine.run.progress import Quiet
from engine.values import Step
from tests import toys
from tests.architectures import architectures
from tests.conftest import machine
from tests.evidence import small
from truth import device, pipelines, saved

PROMPTS = ["a red circle on a blue background", "a white square on a red background"]
CPU = Context(device="cpu", dtype="float32")
needs_device = pytest.mark.skipif(
    shutil.which("c++") is None and "CI" not in os.environ, reason="the counted device takes a C++ compiler (c++)"
)


def plan_for(*steps: Any, **more: Any) -> Plan:
    return engine.resolve(optimizers=list(steps), hardware=machine(), prompts_known=True, **more)


def step(name: str, **params: Any) -> Step:
    return optimizers.spec(name).step(params)


def pixels(plan: Plan, prompts: list[str] = PROMPTS) -> list[Any]:
    return [np.asarray(i) for i in plan.run(prompts, seed=3)]


def ready(plan: Plan, texts: list[str], told: Quiet) -> runner.Ready:
    return runner.prepared(plan, items.calls(prompts.of(texts), 3, plan.request.batch), told)


# What the pictures are.

ASKED: dict[str, dict[str, Any]] = {
    "two prompts": {},
    "two pictures at a time": {"batch": 2},
    "what not to draw": {"call": {"negative_prompt": "a green triangle", "true_cfg_scale": 3.0}},
}


@pytest.mark.parametrize("name", ASKED)
def test_a_staged_run_draws_the_pictures_of_a_plain_one_to_the_bit_twice_in_a_row(name: str) -> None:
    plain = pixels(plan_for("resident", steps=2, **ASKED[name]))
    made = plan_for("staged_encoding", "resident", steps=2, **ASKED[name])
    for _ in range(2):
        found = pixels(made)
        assert len(found) == len(plain)
        assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


def test_what_is_not_to_be_drawn_is_encoded_for_itself(pipe: Any) -> None:
    """FLUX asks twice: of one answer for both there would be nothing to tell apart."""
    call = {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1], "true_cfg_scale": 3.0, "max_sequence_length": 32}
    drawn, other = stages.encode(pipe, call, "cpu").answers
    assert drawn[0].shape == other[0].shape
    assert not torch.equal(drawn[0], other[0])
    assert len(stages.encode(pipe, {"prompt": PROMPTS[0], "max_sequence_length": 32}, "cpu").answers) == 1


def test_pictures_of_a_staged_run_carry_what_they_were_made_with() -> None:
    plan = plan_for("staged_encoding", "resident", steps=1, batch=2)
    found = list(plan.run(PROMPTS, seed=11))
    assert [p.info["seed"] for p in found] == [11, 12, 13, 14]
    assert [p.info["prompt"] for p in found] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert {p.info["plan_digest"] for p in found} == {plan.digest}


@pytest.mark.parametrize("architecture", architectures("flux", "sd3", "sdxl", "wan"))
def test_every_architecture_draws_staged_what_it_draws_whole(architecture: str) -> None:
    """Loaded in stages from a folder, on the CPU.

    To the rounding of sums: a CPU's kernels go by how weights are aligned, and a file has them otherwise than memory.
    """
    pipe, call = pipelines.made(architecture)
    parts = saved.parts_of(pipe, saved.folder(architecture), "float32")
    steps = (step("staged_encoding"), step("resident"))
    calls = [call, call | {"prompt": "another"}]
    plain = [small.draw(pipe, c) for c in calls]
    before = staged.first(parts, steps, lambda _: calls, CPU, Quiet())
    rest = staged.second(parts, steps, before, CPU, Quiet())
    assert not any(n.startswith("text_encoder") and c is not None for n, c in rest.components.items())
    for one, encoded, drawn in zip(calls, before.encoded, plain, strict=True):
        for _ in range(2):
            with stages.given(rest, encoded, "cpu"):
                np.testing.assert_allclose(small.draw(rest, one), drawn, rtol=0, atol=1e-5)


# What is there, and when.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let plans for the CPU run on the counted device."""
    device.load()
    monkeypatch.setattr(Plan, "torch_device", device.NAME)
    monkeypatch.setattr(run_device, "reset_peak", lambda _: device.reset_peak())
    monkeypatch.setattr(run_device, "peak_allocated_bytes", lambda _: device.counts().peak_bytes)
    gc.collect()
    yield


@needs_device
@pytest.mark.usefixtures("counted")
def test_nothing_of_the_first_stage_is_left_when_the_second_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for("staged_encoding", "model_offload", steps=1)
    weights: list[weakref.ref[Any]] = []
    held: list[int] = []
    before = device.counts().live_bytes
    first, second = staged.first, staged.second

    def watched_first(*args: Any) -> Any:
        found = first(*args)
        weights.extend(w for several in found.weights.values() for w in several)
        return found

    def watched_second(parts: Any, *args: Any) -> Any:
        make = parts.make

        def seen(given: Any) -> Any:
            held.append(device.counts().live_bytes - before)
            assert weights and all(w() is None for w in weights)
            return make(given)

        return second(dataclasses.replace(parts, make=seen), *args)

    monkeypatch.setattr(staged, "first", watched_first)
    monkeypatch.setattr(staged, "second", watched_second)
    drawn = pixels(plan)
    assert held
    assert set(held) == {0}
    plain = pixels(plan_for("resident", steps=1))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, plain, strict=True))


@needs_device
@pytest.mark.usefixtures("counted")
def test_a_run_on_a_device_never_holds_the_encoders_and_the_rest_at_once() -> None:
    plan = plan_for("staged_encoding", "resident", steps=1)
    before = device.counts().live_bytes
    made = ready(plan, PROMPTS, Quiet())
    parts = {n: small.nbytes(c) for n, c in made.pipe.components.items() if isinstance(c, torch.nn.Module)}
    assert set(parts) == {"transformer", "vae"}
    assert device.counts().live_bytes - before < 1.01 * sum(parts.values())
    assert len(made.before) == 2
    for each in made.before:
        assert each.peak_bytes is not None and each.seconds > 0
        assert each.peak_bytes - before < 1.01 * sum(parts.values())  # the encoders are smaller


def test_prompts_that_would_take_too_much_of_the_host_are_encoded_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoders come again for each; the pictures are the same."""
    plan, texts = plan_for("staged_encoding", "resident", steps=1), [*PROMPTS, "a green triangle"]
    whole = pixels(plan, texts)
    one = ready(plan, texts[:1], Quiet()).before[0].encoded.size_bytes
    assert one > 0
    monkeypatch.setattr(runner, "ENCODED_BYTES", one + 1)
    assert [len(ready(plan, texts, Quiet()).calls), len(ready(plan, texts[2:], Quiet()).calls)] == [2, 1]
    assert all(np.array_equal(a, b) for a, b in zip(pixels(plan, texts), whole, strict=True))


def test_encoders_that_somebody_keeps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    encode = stages.encode

    def keeping(pipe: Any, *args: Any) -> Any:
        kept.append(pipe.text_encoder)
        return encode(pipe, *args)

    monkeypatch.setattr(stages, "encode", keeping)
    with pytest.raises(NotApplied, match="staged_encoding") as caught:
        pixels(plan_for("staged_encoding", "resident", steps=1))
    assert caught.value.why == "text_encoder is still in memory after the prompts were encoded"


def test_steps_act_in_the_stage_of_what_they_act_on() -> None:
    parts = ("text_encoder", "text_encoder_2", "transformer", "vae")
    casting = step("layerwise_casting", components=["text_encoder_2", "transformer"])
    offload = step("model_offload", components=["text_encoder", "vae"])
    listed = (step("staged_encoding"), step("dtype", value="float32"), casting, step("vae_tiling"), offload)
    first = staged_encoding.first_stage(listed, parts)
    second = staged_encoding.second_stage(listed, parts)
    assert [(s.name, s.params.get("components")) for s in first] == [
        ("dtype", None),
        ("layerwise_casting", ("text_encoder_2",)),
    ]
    assert [(s.name, s.params.get("components")) for s in second] == [
        ("dtype", None),
        ("layerwise_casting", ("transformer",)),
        ("vae_tiling", None),
        ("model_offload", ("text_encoder", "vae")),
    ]
    only_text = step("layerwise_casting", components=["text_encoder_2"])
    assert staged_encoding.second_stage([only_text], parts) == ()
    assert staged_encoding.first_stage([step("layerwise_casting")], parts) == ()


def test_casts_of_both_stages_are_seen_to_hold() -> None:
    told: list[str] = []

    class Heard(Quiet):
        def say(self, text: str) -> None:
            told.append(text.strip())

    casting = {"name": "layerwise_casting", "params": {"components": ["text_encoder_2", "transformer"]}}
    made = ready(plan_for("staged_encoding", casting, "resident"), PROMPTS[:1], Heard())
    told = [line for line in told if line.partition(":")[0] in optimizers.NAMES]
    assert [line.partition(":")[0] for line in told] == [
        "layerwise_casting",
        "staged_encoding",
        "layerwise_casting",
        "resident",
    ]
    assert "of text_encoder_2's" in told[0] and "transformer" in told[2] and "text_encoder" not in told[2]
    assert told[1].endswith("text_encoder, text_encoder_2 encoded 1 prompt, and nothing of it is left")
    assert made.pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn


# What is refused, and what stops it.


def test_a_pipeline_is_not_given_out_under_it(pipe: Any) -> None:
    plan = plan_for("staged_encoding", "resident")
    for door in (plan.load, lambda: plan.apply(pipe)):
        with pytest.raises(IncompatibleError, match="is how a run is made") as caught:
            door()
        assert "plan.run(" in str(caught.value)


def test_what_the_pipeline_refuses_is_a_usage_error_before_the_rest_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "second", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UsageError, match="max_sequence_length"):
        pixels(plan_for("staged_encoding", "resident", call={"max_sequence_length": 4096}))


def test_a_pipeline_that_encodes_with_more_than_its_text_encoders_is_refused(pipe: Any) -> None:
    real = pipe.encode_prompt

    def with_more(*args: Any, **given: Any) -> Any:
        pipe.transformer(torch.zeros(1))
        return real(*args, **given)

    pipe.encode_prompt = with_more
    with pytest.raises(IncompatibleError, match="it uses transformer for it"):
        stages.encode(pipe, {"prompt": "x"}, "cpu")


def test_a_call_that_asks_again_and_one_that_needs_an_encoder_are_refused(pipe: Any) -> None:
    encoded = stages.encode(pipe, {"prompt": "x", "max_sequence_length": 32}, "cpu")
    pipe.text_encoder = pipe.text_encoder_2 = None
    with stages.given(pipe, encoded, "cpu"):
        pipe.encode_prompt()
        with pytest.raises(IncompatibleError, match="encodes more than its prompts"):
            pipe.encode_prompt()
    with pytest.raises(IncompatibleError, match="cannot be called without its text encoders"):
        with stages.given(pipe, encoded, "cpu"):
            pipe.text_encoder.dtype  # noqa: B018


@needs_device
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("room", "told"),
    [
        (0.5, "the text encoders were loaded (stage one"),
        (1.02, "the prompts were encoded (stage one"),
        (1.5, "the rest was loaded (stage two"),
        (None, "generating (stage two"),
    ],
)
def test_running_out_of_memory_says_in_which_stage(room: float | None, told: str) -> None:
    """`room`, in sizes of the text encoders; None: what the rest takes at rest, and a little."""
    model = {n: small.nbytes(c) for n, c in _components().items()}
    encoders = sum(b for n, b in model.items() if n.startswith("text_encoder"))
    size = (sum(model.values()) - encoders) * 1.01 if room is None else encoders * room
    with device.capacity(device.counts().live_bytes + round(size)), pytest.raises(OutOfMemoryError) as caught:
        pixels(plan_for("staged_encoding", "resident", steps=1))
    assert told in caught.value.what
    assert caught.value.exit_code == 7


def _components() -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    from engine import paths

    found = DiffusionPipeline.from_pretrained(paths.embedded_model_dir()).components
    return {n: c for n, c in found.items() if isinstance(c, torch.nn.Module)}


@pytest.mark.slow
def test_ctrl_c_between_the_stages_exits_130_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes where the first stage has ended and nothing of the second is loaded."""
    code = (
        "import signal, sys\n"
        "from engine import cli\n"
        "from engine.run import staged\n"
        "staged._see_gone = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    # Through a profile: there is no flag.
    profile = tmp_path / "profiles" / "staged.yaml"
    profile.parent.mkdir()
    profile.write_text(
        "schema: dg-run/profile@1\nname: staged\nversion: 1.0.0\nsummary: text first\n"
        "optimizers:\n  - staged_encoding\n  - dtype: auto\n  - resident\n"
    )
    command = [sys.executable, "-c", code, "--auto", "--device", "cpu", "--prompt", PROMPTS[0]]
    arguments = ["--profile", str(profile), "--num_inference_steps", "1"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    where = tmp_path / "out"
    where.mkdir()
    done = subprocess.run([*command, *arguments], cwd=where, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "encoding the prompts: done" in done.stderr and "Traceback" not in done.stderr
    assert [p for p in where.rglob("*") if p.is_file()] == []
    monkeypatch.chdir(where)
    assert cli.main([*command[3:], *arguments, "--seed", "3", "--output", "p.png"]) == 0
    drawn = capsys.readouterr()
    assert "encoded 1 prompt, and nothing of it is left" in drawn.err
    assert drawn.out == "p.png\n"


# What the host holds while components are loaded.

CHILD = """
import json, sys, threading, time
from pathlib import Path
import torch
from engine import optimizers, prompts
from engine.optimizers.spec import Context
from engine.run import load, staged
from engine.run.progress import Quiet
from tests.test_staged import large
from truth import saved

folder, names, parameters = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
pipe, call = large(weightless=True)
whole = saved.parts_of(pipe, Path(folder), "bfloat16")
steps = tuple(optimizers.spec(n).step(p) for n, p in zip(names, parameters, strict=True))
# What is on meta is in nobody's memory, as what is on a card is not in the host's.
here = Context(device="meta", dtype="bfloat16")


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


most, is_over = anonymous(), False
before = most


def watch():
    global most
    while not is_over:
        most = max(most, anonymous())
        time.sleep(0.001)


watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
if names[0] == "staged_encoding":
    first = staged.first(whole, steps, lambda _: (), here, Quiet())
    staged.second(whole, steps, first, here, Quiet())
else:
    load.made(whole, list(whole.twins), steps, {}, here, Quiet())
is_over = True
watcher.join()
print(most - before)
"""


def large(*, weightless: bool = False) -> tuple[Any, dict[str, Any]]:
    """A pipeline whose net and text encoder are some 60 MB each in bfloat16, and twice that as they are stored."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    small_one, call = pipelines.made("pixart")
    config = dict(small_one.transformer.config) | {"num_attention_heads": 64, "cross_attention_dim": 1024}
    with torch.device("meta" if weightless else "cpu"):
        net = PixArtTransformer2DModel.from_config(config | {"caption_channels": 1024})
        text = T5EncoderModel(T5Config(vocab_size=1000, d_model=1024, d_kv=64, d_ff=2816, num_layers=3, num_heads=16))
    return PixArtSigmaPipeline(**small_one.components | {"transformer": net, "text_encoder": text}), call


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("large")
    saved.save(large()[0], where)
    return where


LOADED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "resident": [("resident", {})],
    "cast, resident": [("layerwise_casting", {}), ("resident", {})],
    "staged, resident": [("staged_encoding", {}), ("resident", {})],
}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what of a process's memory is in no file")
@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_the_host_holds_at_most_what_is_predicted_while_it_loads(name: str, large_folder: Path) -> None:
    """Within a tenth: what the C library keeps of what it is given back, and what loading takes by the way.

    Where layers are cast it may keep all that they were, beside the half as much that they are then.
    """
    listed = LOADED[name]
    parts = record.components({n: c for n, c in large(weightless=True)[0].components.items() if _has_weights(c)})
    bare = toys.trace(Builder(), *map(_in_bfloat16, parts))
    placement = whole.placed(bare, [step(n, **p) for n, p in listed], "bfloat16")
    told = whole.host_bytes(bare, placement, {}, "bfloat16").anonymous_bytes
    assert told is not None
    predicted = told - HOST_BASE_BYTES
    arguments = [str(large_folder), json.dumps([n for n, _ in listed]), json.dumps([p for _, p in listed])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    most, all_of_it = int(done.stdout), sum(w.size_bytes for c in bare.components for w in c.weights())
    assert 0.9 * predicted < most < (1.5 if name.startswith("cast") else 1.1) * predicted
    assert most < 0.8 * all_of_it


def _has_weights(component: Any) -> bool:
    return isinstance(component, torch.nn.Module)


def _in_bfloat16(component: TracedComponent) -> TracedComponent:
    """Return a component that was traced in float32 as it is loaded."""
    return dataclasses.replace(
        component,
        modules=tuple(
            dataclasses.replace(
                m,
                weights=tuple(
                    dataclasses.replace(w, size_bytes=w.size_bytes // 2, dtype="bfloat16") for w in m.weights
                ),
            )
            for m in component.modules
        ),
    )
