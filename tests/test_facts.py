"""Models from configuration files: found, or refused with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from engine import facts, paths
from engine.errors import ModelError
from engine.facts import catalogue, directory, integrity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model's folder, to be damaged."""
    return Path(shutil.copytree(paths.embedded_model_dir(), tmp_path / "model"))


def refusal(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        integrity.check(facts.find(str(name)))
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_the_embedded_model_is_whole() -> None:
    model = facts.find(None)
    integrity.check(model)
    assert model.pipeline_class == "FluxPipeline"
    assert set(model.components) >= {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert model.size_multiple == 16


def test_a_directory_is_the_same_model(folder: Path) -> None:
    model = facts.find(str(folder))
    integrity.check(model)
    assert model.components == facts.find(None).components


@pytest.mark.parametrize("name", catalogue.ids())
def test_every_model_of_the_catalogue_is_found(name: str) -> None:
    model = facts.find(name)
    assert model.pipeline_class
    assert model.components
    for side in (model.defaults.height, model.defaults.width):
        assert side is None or model.size_multiple is None or side % model.size_multiple == 0


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 8),
        ("black-forest-labs/FLUX.1-dev", 16),
        ("black-forest-labs/FLUX.1-Fill-dev", 16),
        ("stabilityai/stable-diffusion-3.5-medium", 16),
        ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 16),
        ("Lightricks/LTX-Video", None),
    ],
)
def test_what_sizes_must_be_divisible_by(name: str, multiple: int | None) -> None:
    assert facts.find(name).size_multiple == multiple


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("black-forest-labs/FLUX1-dev", "did you mean black-forest-labs/FLUX.1-dev"),
        ("FLUX.1-dev", "neither a directory here nor a name of the form OWNER/MODEL"),
        ("nobody/nothing-like-it", "HF_HUB_OFFLINE is set"),
        ("  ", "the model's name is empty"),
        ("x" * 5000, "there is no model"),
        ("../nowhere/at/all", "there is no model"),
        (__file__, "is a file, not a model's directory"),
    ],
)
def test_a_model_that_is_not_there(name: str, part: str) -> None:
    assert part in refusal(name)


def test_a_directory_without_an_index(tmp_path: Path) -> None:
    assert "there is no model_index.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("{", "is not JSON"),
        ("[]", "a JSON object is wanted"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "names no pipeline class"),
        ('{"_class_name": ["pipeline", "Evil"]}', "code that comes with a model is not run"),
        ('{"_class_name": "../evil"}', "names no pipeline class"),
        ('{"_class_name": "FluxPipeline", "vae": ["diffusers"]}', "names no class for its component 'vae'"),
        ('{"_class_name": "FluxPipeline", "vae": ["os; rm", "x"]}', "names no class for its component 'vae'"),
        ('{"_class_name": "FluxPipeline", "../vae": ["diffusers", "AutoencoderKL"]}', "that is not a name"),
    ],
)
def test_an_index_that_is_damaged_or_hostile(tmp_path: Path, index: str, part: str) -> None:
    (tmp_path / "model_index.json").write_text(index, encoding="utf-8")
    assert part in refusal(tmp_path)


def test_a_weight_file_that_was_cut_off(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"has {len(whole) // 2:,} bytes where its header says {len(whole):,}" in refusal(folder)
    weights.write_bytes(whole[:5])
    assert "cut off within its header" in refusal(folder)
    weights.write_bytes(struct.pack("<Q", 4) + b"nope")
    assert "damaged header" in refusal(folder)
    weights.write_bytes(struct.pack("<Q", 2**60))
    assert "cut off within its header" in refusal(folder)
    weights.unlink()
    assert "transformer holds no weights" in refusal(folder)


def test_a_component_that_is_missing(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_2")
    assert "the folder of its component 'text_encoder_2' (T5EncoderModel) is missing" in refusal(folder)


def test_a_shard_that_is_missing(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "vae lacks 2 of 2 weight files, such as model-00001-of-00002.safetensors" in refusal(folder)


def test_pickled_weights_are_named_as_such(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "a pickle, which can run code when it is loaded" in refusal(folder)


def test_a_configuration_that_is_half_there(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text('{"block_out_channels": [8, 16', encoding="utf-8")
    assert "half-downloaded" in refusal(folder)


def test_a_model_in_the_hub_cache_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(paths.embedded_model_dir(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="ascii")
    model = facts.find("someone/tiny")
    assert (model.id, model.source, model.revision) == ("someone/tiny", "cache", commit)
    (repository / "refs" / "main").write_text("../../../..", encoding="ascii")
    assert "is not on this machine" in refusal("someone/tiny")


def tensors(**dtypes: str) -> bytes:
    """Return a safetensors file with tensors of four bytes, in these dtypes."""
    entries = {
        n: {"dtype": d, "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, (n, d) in enumerate(dtypes.items())
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * len(entries))


@pytest.mark.parametrize(
    ("files", "dtype", "variants"),
    [
        ({"diffusion_pytorch_model.safetensors": tensors(a="BF16", b="BF16", ids="I64")}, "bfloat16", ()),
        ({"diffusion_pytorch_model.safetensors": tensors(a="F32")}, "float32", ()),
        ({"model.safetensors": tensors(a="F8_E4M3")}, "float8_e4m3fn", ()),
        ({"model.safetensors": tensors(a="F16", b="F32")}, None, ()),
        # Quantized: bytes, with scales beside them that say nothing of the bytes.
        ({"model.safetensors": tensors(a="U8", scale="F32")}, None, ()),
        (
            {
                "model-00001-of-00002.safetensors": tensors(a="F16"),
                "model-00002-of-00002.safetensors": tensors(b="F16"),
                "model.fp16-00001-of-00001.safetensors": b"not opened",
                "model-00001-of-00001.bf16.safetensors": b"not opened",
                "model.non_ema.safetensors": b"not opened",
                "unrelated.safetensors": b"not opened",
            },
            "float16",
            ("bf16", "fp16", "non_ema"),
        ),
        (
            {
                "model-00001-of-00002.safetensors": tensors(a="F16"),
                "model-00002-of-00002.safetensors": tensors(b="F32"),
            },
            None,
            (),
        ),
    ],
)
def test_the_dtype_of_weights_is_read_from_their_headers(
    folder: Path, files: dict[str, bytes], dtype: str | None, variants: tuple[str, ...]
) -> None:
    for old in (folder / "vae").glob("*.safetensors"):
        old.unlink()
    for name, content in files.items():
        (folder / "vae" / name).write_bytes(content)
    vae = facts.find(str(folder)).components["vae"]
    assert (vae.stored_dtype, vae.variants) == (dtype, variants)


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"torch_dtype": "auto"}, None),
        ({"dtype": {"text_config": "bfloat16"}}, None),
        ({}, None),
    ],
)
def test_without_weights_the_configuration_says_their_dtype(
    folder: Path, said: dict[str, object], dtype: str | None
) -> None:
    place = folder / "text_encoder"
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (place / "config.json").write_text(json.dumps(config | said), encoding="utf-8")
    # What git leaves when the weights were not fetched is as good as none: a plan needs no weights.
    (place / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    model = facts.find(str(folder))
    assert model.components["text_encoder"].stored_dtype == dtype
    with pytest.raises(ModelError, match="git lfs pull"):
        integrity.check(model)


def test_the_catalogue_knows_in_which_dtype_weights_are_stored() -> None:
    stored = {n: c.stored_dtype for n, c in facts.find("black-forest-labs/FLUX.1-dev").components.items()}
    assert (stored["transformer"], stored["text_encoder_2"], stored["scheduler"]) == ("bfloat16", "bfloat16", None)
    # Of every component that has weights.
    for name in catalogue.ids():
        for part, component in facts.find(name).components.items():
            if not component.cls.endswith((*directory.WITHOUT_CONFIG, "Scheduler", "Guidance")):
                assert component.stored_dtype in ("float32", "float16", "bfloat16"), (name, part)


def test_a_safety_checker_is_found_where_its_pipeline_keeps_it(folder: Path) -> None:
    """A model_index.json names the folder of the pipeline as the library."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["vae"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    checker = facts.find(str(folder)).components["vae"]
    assert (checker.library, checker.module) == ("diffusers", "diffusers.pipelines.stable_diffusion")


def test_a_component_without_its_configuration(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    assert "the configuration of its component 'vae' (AutoencoderKL) is missing" in refusal(folder)
