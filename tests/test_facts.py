"""Models from configuration files: found, or refused with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from engine import facts, paths
from engine.errors import ModelError
from engine.facts import catalogue, integrity


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
