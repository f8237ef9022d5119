"""Tiles and slices, class by class."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from engine import facts, optimizers
from engine.errors import IncompatibleError
from engine.facts import catalogue, tiling
from engine.optimizers.spec import Context
from tests.evidence import small

WAYS = {"vae_tiling": "tiling", "vae_slicing": "slicing"}


def _vaes() -> dict[str, Any]:
    from diffusers.models.autoencoders.vae import AutoencoderMixin

    return {n: c for n, c in small.models().items() if issubclass(c, AutoencoderMixin)}


@pytest.mark.rule("vaes-without-tiling", "vaes-without-slicing")
@pytest.mark.parametrize("step", WAYS)
def test_the_vaes_that_have_no_tiles_or_slices(step: str) -> None:
    rule = f"vaes-without-{WAYS[step]}"
    lacking = {n for n, c in _vaes().items() if f"self.use_{WAYS[step]} = " not in inspect.getsource(c.__init__)}
    lacking |= {
        n
        for n, c in small.models().items()
        if n.startswith(("Autoencoder", "VQ", "Cosmos3AV")) and not hasattr(c, f"enable_{WAYS[step]}")
    }
    assert lacking == small.listed(rule)

    class Pipeline:
        vae = diffusers.AsymmetricAutoencoderKL(
            down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=2
        )

    with pytest.raises(NotImplementedError):
        getattr(Pipeline.vae, f"enable_{WAYS[step]}")()
    with pytest.raises(IncompatibleError, match=f"{step} cannot act"):
        optimizers.get(step).apply(Pipeline(), optimizers.spec(step).step(), Context(device="cpu", dtype="float32"))


@pytest.mark.rule("tiling-that-is-never-read")
def test_the_vaes_whose_tiling_is_never_read() -> None:
    folder = Path(diffusers.__file__).parent / "models" / "autoencoders"
    sets = re.compile(r"self\.use_tiling = False")
    reads = re.compile(r"self\.use_tiling\b(?! =)")
    idle = {
        name
        for path in folder.glob("autoencoder_*.py")
        if sets.search(text := path.read_text(encoding="utf-8")) and not reads.search(text)
        for name in re.findall(r"^class (Autoencoder\w+)", text, re.MULTILINE)
    }
    assert idle == small.listed("tiling-that-is-never-read")
    module = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    ).eval()
    seen = small.calls(module.decoder)
    module.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    module.decode(torch.randn(1, 4, 3, 8, 8))
    assert len(seen) == 1


@pytest.mark.rule("no-vae-no-tiles")
@pytest.mark.parametrize("step", WAYS)
def test_a_pipeline_without_a_vae_has_nothing_to_tile(step: str) -> None:
    class Pipeline:
        """One that decodes by another component, as Kandinsky does."""

    with pytest.raises(IncompatibleError, match=f"{step} cannot act"):
        optimizers.get(step).apply(Pipeline(), optimizers.spec(step).step(), Context(device="cpu", dtype="float32"))
    assert facts.find("kandinsky-community/kandinsky-2-2-decoder").components.get("vae") is None


@pytest.mark.rule("pipelines-have-no-switches-of-their-vae")
def test_pipelines_have_no_switches_of_their_vae() -> None:
    for name in dir(diffusers):
        found = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
        if isinstance(found, type):
            assert not {"enable_vae_tiling", "enable_vae_slicing", "disable_vae_tiling"} & set(dir(found)), name


@pytest.mark.rule("tiling-a-small-picture")
def test_tiling_starts_strictly_above_the_tile() -> None:
    module = small.vae()
    module.enable_tiling()
    seen = small.calls(module.decoder)
    module.decode(small.latents(16))
    assert len(seen) == 1
    seen.clear()
    assert module.decode(small.latents(32)).sample.shape[-1] == 64
    assert len(seen) == 9  # tiles of 16 latents, 12 apart


@pytest.mark.rule("a-tile-is-set-with-its-stride")
def test_a_tile_that_is_set_alone_gives_another_size() -> None:
    module = small.vae()
    module.enable_tiling()
    module.tile_sample_min_size = 16
    assert module.decode(small.latents(32)).sample.shape[-1] == 36
    module.tile_latent_min_size = 8
    assert module.decode(small.latents(32)).sample.shape[-1] == 64
    torch.manual_seed(0)
    video = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    given = torch.randn(1, 16, 1, 8, 8)
    tile = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
    video.enable_tiling(**tile)
    assert video.decode(given).sample.shape[-1] == 32
    video.enable_tiling(**tile, tile_sample_stride_height=16, tile_sample_stride_width=16)
    assert video.decode(given).sample.shape[-1] == 64


def _hunyuan_15() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16,) * 5,
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    ).eval()


@pytest.mark.rule("hunyuan-video-15-decodes-one-video-at-a-time")
def test_a_batch_of_hunyuan_video_15_is_decoded_in_slices() -> None:
    module, given = _hunyuan_15(), torch.randn(2, 4, 3, 4, 4)
    with pytest.raises(RuntimeError):
        module.decode(given)
    module.decode(given[:1])
    module.enable_slicing()
    assert module.decode(given).sample.shape[0] == 2


@pytest.mark.rule("hunyuan-video-15-tiles-by-its-latents")
def test_hunyuan_video_15_reads_its_tile_in_latents() -> None:
    module, given = _hunyuan_15(), torch.randn(1, 4, 1, 8, 8)
    module.enable_tiling()
    seen = small.calls(module.decoder)
    module.tile_sample_min_height = module.tile_sample_min_width = 64
    module.decode(given)
    assert len(seen) == 1
    module.tile_latent_min_height = module.tile_latent_min_width = 4
    module.decode(given)
    assert len(seen) > 2


@pytest.mark.rule("allegro-decodes-in-tiles-only")
def test_allegro_does_not_decode_whole() -> None:
    module = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1, sample_size=320
    )
    with pytest.raises(NotImplementedError, match="without tiling"):
        module.decode(torch.randn(1, 4, 3, 8, 8))


@pytest.mark.rule("cogvideox-tiles-that-do-not-add-up")
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 80), (480, 720)])
def test_tiles_of_cogvideox_add_up_where_they_are_said_to(height: int, width: int) -> None:
    torch.manual_seed(0)
    config: dict[str, Any] = {"block_out_channels": (8,) * 4, "sample_height": height, "sample_width": width}
    module = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        **config,
    ).eval()
    sides = module.tile_latent_min_height + 4, module.tile_latent_min_width + 4
    wanted = tuple(8 * s for s in sides)
    given = torch.randn(1, 4, 1, *sides)
    module.enable_tiling()
    # The decoder itself is of no interest here: eight pixels for a latent.
    module.decoder.forward = lambda x, conv_cache=None: (x[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4), None)
    is_another = module.decode(given).sample.shape[-2:] != wanted
    assert tiling.are_of_another_size("AutoencoderKLCogVideoX", config) is is_another
    assert is_another is ((height, width) == (64, 64))


def test_the_tiles_of_the_catalogue_add_up() -> None:
    for model in map(facts.find, catalogue.ids()):
        if "vae" in model.components:
            vae = model.components["vae"]
            assert tiling.are_of_another_size(vae.cls, vae.config) is False, model.id


@pytest.mark.rule("slicing-a-single-picture")
def test_slices_are_of_a_batch(counted: torch.device) -> None:
    module = small.vae()
    seen = small.calls(module.decoder)
    module.enable_slicing()
    for batch in (1, 2, 4):
        seen.clear()
        module.decode(small.latents(batch=batch))
        assert len(seen) == batch
    module.to(counted)

    def taken(batch: int, is_sliced: bool) -> int:
        module.use_slicing = is_sliced
        given = small.latents(16, batch).to(counted)
        return small.peak(lambda: module.decode(given))

    assert taken(1, True) == taken(1, False)
    assert taken(4, True) < taken(4, False)
