"""Models made to harm, or by mistake: refused with exit code 5 and in three parts, soon, and nothing of them runs."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine import facts
from engine.cli import main
from engine.errors import ModelError, UsageError
from engine.facts import bounds, catalogue, directory
from engine.facts.model import Component, Model
from engine.values import FrozenDict

MOST_S = 5.0
FLUX: Mapping[str, Any] = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
INDEX: Mapping[str, Any] = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: an index, one component's configuration, and code that tells when it is run."""
    (tmp_path / "transformer").mkdir()
    canary = f"open({str(_canary(tmp_path))!r}, 'w').close()\n"
    for name in ("my_module.py", "pipeline.py", "transformer/my_module.py", "transformer/os.py"):
        (tmp_path / name).write_text(canary, encoding="utf-8")
    write(tmp_path)
    return tmp_path


def _canary(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_was_run")


def write(folder: Path, config: object = FLUX, **index: object) -> None:
    (folder / "model_index.json").write_text(json.dumps({**INDEX, **index}), encoding="utf-8")
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that sees a folder refused by `dg-run plan`, and returns what was said."""
    monkeypatch.chdir(folder)  # where a module of the model's would be found, were it looked for

    def see(model: Path | None = None) -> str:
        before, started = set(sys.modules), time.monotonic()
        code = main(["plan", "--model", str(model or folder)])
        seconds = time.monotonic() - started
        told = capsys.readouterr().err
        assert code == 5, told
        assert [line[:6] for line in told.splitlines()] == ["dg-run", "  why:", "  do: "], told
        assert "Traceback" not in told
        assert len(told) < 1500
        assert seconds < MOST_S
        assert not _canary(folder).exists()
        assert not {m for m in set(sys.modules) - before if m.partition(".")[0] in ("torch", "diffusers", "my_module")}
        return told

    return see


def test_the_folder_is_good_before_it_is_made_bad(folder: Path) -> None:
    assert facts.find(str(folder)).components["transformer"].config == FLUX


# Names


@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["os", "System"],
        ["builtins", "Eval"],
        ["subprocess", "Popen"],
        ["my_module", "Evil"],
        ["diffusers.utils", "BaseOutput"],
        ["diffusers_modules.local.my_module", "Evil"],
        ["transformers.models.auto", "AutoModel"],
        ["torch.nn", "Linear"],
        ["pipeline_utils", "DiffusionPipeline"],
        ["../../my_module", "Evil"],
        ["diffusers", "logging"],
        ["diffusers", "__init__"],
        ["diffusers", "_LazyModule"],
        ["diffusers", "FluxPipeline.from_pretrained"],
        ["diffusers", "Flux\u0000Pipeline"],
        ["diffusers", "A" * 10_000],
        ["diffusers", 1],
        ["diffusers", None],
        [["diffusers"], "FluxTransformer2DModel"],
        ["diffusers", "FluxTransformer2DModel", "x"],
        ["diffusers"],
    ],
    ids=lambda entry: json.dumps(entry)[:40],
)
def test_a_class_outside_the_libraries(folder: Path, refused: Callable[..., str], entry: list[Any]) -> None:
    write(folder, transformer=entry)
    told = refused()
    assert "transformer" in told.splitlines()[0]
    assert json.dumps(entry)[:40] in told


@pytest.mark.parametrize(
    "name",
    ["../../etc", "..", "/etc", "a/b", "", "a\u0000b", "~", "a b", "C:\\x", "x" * 300, "\ud800"],
    ids=lambda name: ascii(name)[:20],
)
def test_a_component_that_leaves_the_folder(folder: Path, refused: Callable[..., str], name: str) -> None:
    write(folder, **{name: ["diffusers", "FluxTransformer2DModel"]})
    assert "has a component called" in refused()


@pytest.mark.parametrize(
    "name",
    ["os", "my_module", "logging", "DiffusionPipeline.from_pretrained", ["pipeline", "Evil"], 1, None, "X" * 10**5, ""],
    ids=lambda name: json.dumps(name)[:20],
)
def test_a_pipeline_that_is_not_the_librarys(folder: Path, refused: Callable[..., str], name: object) -> None:
    write(folder, _class_name=name)
    assert "names no pipeline class of the library" in refused()


def test_more_components_than_any_pipeline_has(folder: Path, refused: Callable[..., str]) -> None:
    write(folder, **{f"part_{i}": ["diffusers", "FluxTransformer2DModel"] for i in range(10_000)})
    assert "it names 10,001 components" in refused()


# Files


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is not JSON"),
        (b"weights", "is not JSON"),
        (b"\x80\x04K\x01.", "is not JSON"),
        (b"\xff\xfe{\x00}\x00", "is not JSON"),
        (b'{"num_layers": 2', "is not JSON"),
        (b"[1, 2]", "a JSON object is wanted"),
        (b"null", "a JSON object is wanted"),
        (b'{"a": ' * 200_000, "is not"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "nested more than"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than"),
        (b'{"num_layers": ' + b"9" * 100_000 + b"}", "is not JSON"),
        (b'{"num_layers": ' + b"9" * 4_000 + b"}", "num_layers is 9"),
        (b'{"num_layers": 1e400}', "num_layers is inf"),
        (b'{"eps": NaN}', "eps is not a number"),
        (b'{"a": [' + b"1," * 300_000 + b"1]}", "more than 100,000 entries"),
        (b'{"a": "' + b"x" * 2_000_000 + b'"}', "more than 1,048,576 bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_configuration_that_is_none(
    folder: Path, refused: Callable[..., str], name: str, content: bytes, part: str
) -> None:
    (folder / name).write_bytes(content)
    told = refused()
    # Where the contents are JSON, the index lacks the pipeline's name before it has anything else wrong.
    assert part in told or (name == "model_index.json" and "names no pipeline class" in told)


def test_a_configuration_of_gigabytes_is_not_read(folder: Path, refused: Callable[..., str]) -> None:
    with (folder / "transformer" / "config.json").open("wb") as stream:
        stream.truncate(40 * 1024**3)
    tracemalloc.start()
    try:
        assert "has more than" in refused()
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024**2
    finally:
        tracemalloc.stop()


def test_the_densest_configuration_takes_bounded_memory(folder: Path) -> None:
    """A million bytes of empty lists are what Python takes most for."""
    (folder / "transformer" / "config.json").write_bytes(b'{"a": [' + b"[]," * 349_000 + b"[]]}")
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="more than 100,000 entries"):
            facts.find(str(folder))
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024**2
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither pipes in folders nor devices")
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling"])
def test_what_is_not_a_file(folder: Path, refused: Callable[..., str], name: str, kind: str) -> None:
    place = folder / name
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to({"device": Path("/dev/zero"), "loop": place, "dangling": folder / "nothing"}[kind])
    told = refused()
    assert place.name in told or "the configuration of its component 'transformer'" in told


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_folders_that_are_loops(
    folder: Path, refused: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    loop = tmp_path_factory.mktemp("loops") / "model"
    loop.symlink_to(loop)
    assert "there is no model" in refused(loop)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    (folder / "transformer").rmdir()
    (folder / "transformer").symlink_to(folder / "transformer")
    assert "the folder of its component 'transformer'" in refused()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["transformer/config.json", "transformer", "model_index.json", "."])
def test_what_may_not_be_read(folder: Path, refused: Callable[..., str], name: str) -> None:
    place = folder / name
    mode = place.stat().st_mode
    place.chmod(0)
    try:
        assert "ermission denied" in refused()
    finally:
        place.chmod(mode)


def test_a_file_that_the_system_will_not_open(
    folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where a test may read everything: the system's refusal is made up, what is made of it is not."""
    real = Path.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    told = refused()
    assert "config.json cannot be read" in told
    assert "why: Permission denied" in told


# Numbers


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 10**9}, "num_layers is 1,000,000,000"),
        ({"num_layers": 1e18}, "num_layers is 1e+18"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 2**63}, "num_hidden_layers is 9223372036854775808"),
        ({"num_single_layers": -3}, "num_single_layers is -3"),
        ({"num_layers": 1, "num_single_layers": 10**9}, "num_single_layers is 1,000,000,000"),
        ({"layers_per_block": 0}, "layers_per_block is 0"),
        ({"layers_per_block": [2, 10**9]}, "layers_per_block is 1,000,000,000"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10,000,000"),
        ({"hidden_size": 10**9}, "hidden_size is 1,000,000,000"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": -768}, "hidden_size is -768"),
        ({"attention_head_dim": 10**9}, "attention_head_dim is 1,000,000,000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"in_channels": -4}, "in_channels is -4"),
        ({"block_out_channels": [320, 10**12]}, "block_out_channels is 1,000,000,000,000"),
        ({"vocab_size": 10**10}, "vocab_size is 10,000,000,000"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"sample_size": 10**6}, "sample_size is 1,000,000"),
        ({"pos_embed_max_size": 10**6}, "pos_embed_max_size is 1,000,000"),
        ({"num_train_timesteps": 10**10}, "num_train_timesteps is 10,000,000,000"),
        ({"anything": 10**12}, "anything is 1,000,000,000,000"),
        ({"mlp_ratio": 1e300}, "mlp_ratio is 1e+300"),
        ({"num_layers": float("nan")}, "num_layers is not a number"),
        ({"num_attention_heads": 10**6, "attention_head_dim": 10**6}, "parameters"),
        ({"num_layers": 500, "num_attention_heads": 2**17, "attention_head_dim": 128}, "parameters"),
        ({"down_block_types": ["DownBlock2D"] * 5_000}, "about 5,000 blocks"),
        (
            {"block_out_channels": [8] * 100, "layers_per_block": 50, "transformer_layers_per_block": 50},
            "about 250,000 blocks",
        ),
        ({"num_layers": 400, "num_routed_experts": 10**6}, "experts in 400 blocks"),
        ({"depth": 10**5}, "depth is 100,000"),
        ({"n_layers": 10**5}, "n_layers is 100,000"),
        ({"encoder": {"num_blocks": 10**5}}, "num_blocks is 100,000"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_numbers_that_no_model_has(
    folder: Path, refused: Callable[..., str], config: dict[str, Any], part: str
) -> None:
    write(folder, config)
    told = refused()
    assert "the configuration of its component 'transformer' cannot be a model's" in told
    assert part in told


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 0, "num_single_layers": 4},
        {"lambda_min_clipped": float("-inf")},
        {"rope_theta": 10**12, "bos_token_id": -1, "max_length": 10**30},
        {"num_layers": None, "hidden_size": "768"},
        {"_attn_implementation": "sdpa", "use_pretrained_backbone": False},
        {},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_numbers_that_models_have(config: dict[str, Any]) -> None:
    bounds.check(config, "model", "part")


def test_no_model_of_the_catalogue_is_near_a_bound() -> None:
    for name in catalogue.ids():
        for part, component in facts.find(name).components.items():
            bounds.check(component.config, name, part)


# What the libraries would fetch


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"_attn_implementation": "someone/kernels"}, "code that would be downloaded and run"),
        ({"attn_implementation": {"text_config": "someone/kernels:run"}}, "code that would be downloaded and run"),
        ({"text_config": {"_attn_implementation": "paged|someone/kernels@main"}}, "code that would be downloaded"),
        ({"experts_implementation": "someone/kernels"}, "code that would be downloaded and run"),
        ({"use_pretrained_backbone": True}, "makes transformers download another model"),
        ({"vision_config": {"use_timm_backbone": True}}, "makes transformers download another model"),
    ],
)
def test_a_configuration_that_has_something_fetched(
    folder: Path, refused: Callable[..., str], config: dict[str, Any], part: str
) -> None:
    write(folder, config)
    assert part in refused()


# Weight files


def _header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "cut off within its header"),
        (_header(b"{}", 2**63), "cut off within its header"),
        (_header(b" " * (17 * 1024**2)), "has a header of 17,825,792 bytes"),
        (_header(b"{" * 1_000_000), "damaged header"),
        (_header(b'{"a": ' * 100_000), "damaged header"),
        (_header(b"[]"), "damaged header"),
        (_header(b'{"a": 1}'), "damaged header"),
        (_header(b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}'), "damaged header"),
        (_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'), "damaged header"),
        (_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'), "damaged header"),
        (_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "ab"}}'), "damaged header"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_weight_file_with_a_hostile_header(
    folder: Path, refused: Callable[..., str], content: bytes, part: str
) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert part in refused()


def test_thousands_of_weight_files(folder: Path, refused: Callable[..., str]) -> None:
    for i in range(1_001):
        (folder / "transformer" / f"model-{i:05}-of-01001.safetensors").write_bytes(b"")
    assert "it has 1,001 weight files" in refused()


# What gets through the facts is built from the libraries' classes or not at all


def _built(pipeline_class: str, cls: str, library: str = "diffusers", module: str | None = None, **config: Any) -> None:
    import torch

    from engine.dryrun import build

    part = Component(library=library, cls=cls, module=module, config=FrozenDict(config))
    model = Model(
        id="hostile", source="directory", pipeline_class=pipeline_class, components=FrozenDict({"transformer": part})
    )
    started = time.monotonic()
    try:
        build.pipeline(model, torch.bfloat16)
    finally:
        assert time.monotonic() - started < 2 * MOST_S


@pytest.mark.parametrize(
    ("pipeline_class", "part"),
    [
        ("NoSuchPipeline", {"cls": "FluxTransformer2DModel"}),
        ("FluxTransformer2DModel", {"cls": "FluxTransformer2DModel"}),
        ("logging", {"cls": "FluxTransformer2DModel"}),
        ("FluxPipeline", {"cls": "FluxTransformer9DModel"}),
        ("FluxPipeline", {"cls": "logging"}),
        ("FluxPipeline", {"cls": "randn_tensor", "module": "diffusers.utils.torch_utils"}),
        ("FluxPipeline", {"cls": "Path", "module": "diffusers.utils.hub_utils"}),
        ("FluxPipeline", {"cls": "Popen", "library": "subprocess", "module": "subprocess"}),
        ("FluxPipeline", {"cls": "FluxModel", "module": "diffusers.pipelines.no_such"}),
        ("FluxPipeline", {"cls": "Trainer", "library": "transformers"}),
        ("FluxPipeline", {"cls": "AutoModel", "library": "transformers", "model_type": "bert"}),
        ("FluxPipeline", {"cls": "AutoPipelineForText2Image"}),
        ("FluxPipeline", {"cls": "StableDiffusionPipeline"}),
        ("FluxPipeline", {"cls": "T5EncoderModel", "library": "transformers", "model_type": "no_such"}),
        ("FluxPipeline", {"cls": "T5EncoderModel", "library": "transformers"}),
        (
            "FluxPipeline",
            {"cls": "CLIPTextModel", "library": "transformers", "model_type": "clip_text_model", "hidden_size": "x"},
        ),
        ("FluxPipeline", {"cls": "FluxTransformer2DModel", "num_layers": "two"}),
        ("FluxPipeline", {"cls": "FluxTransformer2DModel", "num_attention_heads": None}),
        ("FluxPipeline", {"cls": "UNet2DConditionModel", "down_block_types": ["__import__('os')"]}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_class_that_a_dry_run_does_not_build(pipeline_class: str, part: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        _built(pipeline_class, **part)
    assert caught.value.why
    assert caught.value.do


# What is asked for


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"height": 10**6}, "height is 1000000\n  why: it must lie between 1 and 16,384\n  do:  give another height"),
        ({"width": 10**30}, "it must lie between 1 and 16,384"),
        ({"frames": 10**5}, "frames is 100000\n  why: it must lie between 1 and 10,000"),
        ({"batch": 10**6}, "it must lie between 1 and 1,024"),
        ({"steps": 10**9}, "it must lie between 1 and 10,000"),
        ({"height": 0}, "it must lie between 1 and"),
        ({"height": -64}, "it must lie between 1 and"),
        ({"height": float("nan")}, "height must be a whole number"),
        ({"guidance": float("inf")}, "guidance must be a number between"),
    ],
)
def test_a_request_that_cannot_be_meant(asked: dict[str, Any], part: str) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError) as caught:
        engine.resolve(device="cpu", **asked)
    assert part in str(caught.value)
    assert time.monotonic() - started < MOST_S


# Anything at all

_KEYS = st.one_of(
    st.sampled_from(
        [*FLUX, "hidden_size", "layers_per_block", "block_out_channels", "text_config", "dtype", "vae", "_x"]
    ),
    st.text(max_size=8),
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 600),
    st.floats(),
    st.text(max_size=8),
    st.just("diffusers"),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_KEYS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(_KEYS, _VALUES, max_size=6), index=st.dictionaries(_KEYS, _VALUES, max_size=4))
def test_any_json_is_a_model_or_is_refused(folder: Path, config: dict[str, Any], index: dict[str, Any]) -> None:
    write(folder, config, **index)
    try:
        model = directory.read(folder, "any")
    except ModelError as error:
        assert error.why
        return
    assert model.size_multiple is None or model.size_multiple > 0
    model.tiling_starts(1024, 1024)
    assert isinstance(model.ignores_guidance, bool)
