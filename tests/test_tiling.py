"""The tiles of VAEs: what is known of them without torch, against the installed classes; and tiles of other sizes."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from engine import optimizers
from engine.dryrun import run as dryrun
from engine.errors import IncompatibleError, UsageError
from engine.estimate import store
from engine.facts import catalogue, tiling
from engine.facts.model import Component, Model
from engine.optimizers import tiles
from engine.optimizers.spec import Context, NotApplied
from engine.values import FrozenDict, Request
from tests.conftest import draw
from truth import pipelines

HERE = Context(device="cpu", dtype="float32")
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 64,
    },
}
"""Classes whose constructors want to be told."""


def made(cls: str, config: Any) -> Any:
    """Return a VAE without weights."""
    kind = getattr(diffusers, cls)
    taken = inspect.signature(kind.__init__).parameters
    with torch.device("meta"):
        return kind(**{k: v for k, v in config.items() if k in taken})


def known() -> dict[str, tuple[str, Any]]:
    """Return the different VAEs of the catalogue, and one of each class as it is by default."""
    found: dict[str, tuple[str, Any]] = {cls: (cls, SMALL.get(cls, {})) for cls in tiling.FAMILIES}
    for name in catalogue.ids():
        vae = model_of(name).components.get("vae")
        if vae is not None and (vae.cls, vae.config) not in found.values():
            found[name] = vae.cls, vae.config
    return found


def model_of(name: str) -> Model:
    found = catalogue.find(name)
    assert found is not None
    return found


KNOWN = known()


def latents(vae: Any, high: int, wide: int) -> tuple[int, ...]:
    """Return the shape of latents: a picture's, or those of a video of one frame."""
    channels = next(c for n in ("latent_channels", "z_dim", "z_channels") if (c := vae.config.get(n)))
    is_video = any(p.dim() == 5 for p in vae.parameters()) or type(vae).__name__ == "AutoencoderKLQwenImage21"
    return (1, channels, *([1] if is_video else []), high, wide)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_a_vaes_tiles_is_what_its_class_says(name: str) -> None:
    cls, config = KNOWN[name]
    vae = made(cls, config)
    own, scale = tiling.own(cls, config), tiling.scale(cls, config)
    assert own is not None and scale is not None
    sides = [getattr(vae, f"tile_sample_min_{s}", None) or vae.tile_sample_min_size for s in ("height", "width")]
    assert list(own) == sides
    for attribute in tiles._PIXELS_PER_LATENT:
        assert getattr(vae, attribute, scale) == scale
    assert getattr(vae, "tile_latent_min_size", own[0] // scale) == own[0] // scale
    # A tile of the library's own size has the library's own numbers.
    if own[0] == own[1] and cls != "AutoencoderKLCogVideoX" and tiling.sizes(cls, config, own[0]) is not None:
        assert tiles.wrong(vae, own[0]) == {}


@pytest.mark.parametrize(
    "cls", [c if i % 3 == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(tiling.FAMILIES)]
)
def test_a_tile_of_another_size_gives_a_picture_of_the_right_size(cls: str) -> None:
    """Each class as it is by default, without weights; a little more than one tile high and two wide."""
    # By default the decoder of LTX-2 widens less than its encoder narrows.
    config = KNOWN["Lightricks/LTX-2"][1] if cls == "AutoencoderKLLTX2Video" else SMALL.get(cls, {})
    vae = made(cls, config)
    step, scale = tiling.multiple(cls, config), tiling.scale(cls, config)
    assert step is not None and scale is not None
    tile = 2 * step
    tiles.set_sizes(vae, tile)
    vae.enable_tiling()
    assert tiles.wrong(vae, tile) == {}
    high, wide = tile // scale + 1, 2 * tile // scale
    with torch.no_grad(), torch.device("meta"):
        out = vae.decode(torch.empty(latents(vae, high, wide)), return_dict=False)[0]
    assert out.shape[-2:] == (high * scale, wide * scale)


WITH_WEIGHTS = ("sd", "wan", "ltx", "cogvideox", "hunyuan_video", "qwen_image", "sana", "mochi")


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_larger_tiles_are_nearer_to_the_whole_picture(name: str) -> None:
    """Random weights see far beyond a tile's edge, and forgive nothing: what is shown is that the tiles lie right."""
    vae = pipelines.made(name)[0].vae
    cls = type(vae).__name__
    step, scale = tiling.multiple(cls, vae.config), tiling.scale(cls, vae.config)
    assert step is not None and scale is not None
    side = 6 * step // scale
    given = torch.randn(latents(vae, side, side), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = vae.decode(given, return_dict=False)[0]
        vae.enable_tiling()
        off = []
        for tile in (2 * step, 4 * step):
            tiles.set_sizes(vae, tile)
            cut = vae.decode(given, return_dict=False)[0]
            assert cut.shape == whole.shape
            off.append(float((cut - whole).abs().mean() / whole.std()))
    assert off[1] < off[0] and off[1] < 0.7


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_tiling_starts_where_it_is_said_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipelines.made(name)
    vae = pipe.vae
    cls = type(vae).__name__
    step, scale = tiling.multiple(cls, vae.config), tiling.scale(cls, vae.config)
    assert step is not None and scale is not None
    asked: list[Any] = []
    real = vae.tiled_decode

    def noted(*args: Any, **more: Any) -> Any:
        asked.append(1)
        return real(*args, **more)

    monkeypatch.setattr(vae, "tiled_decode", noted)
    component = Component(library="diffusers", cls=cls, config=FrozenDict(vae.config))
    model = Model(id="small", source="test", pipeline_class="", components=FrozenDict({"vae": component}))
    tile = 2 * step
    tiles.set_sizes(vae, tile)
    vae.enable_tiling()
    for side in (tile, tile + scale):
        asked.clear()
        high, wide = tile // scale, side // scale
        with torch.no_grad():
            vae.decode(torch.zeros(latents(vae, high, wide)), return_dict=False)
        assert bool(asked) is model.tiling_starts(tile, side, tile)


def test_a_trained_vae_in_small_tiles_draws_nearly_the_same(pipe: Any) -> None:
    plain = draw(pipe, num_inference_steps=4)
    step = optimizers.spec("vae_tiling").step({"tile": 64})
    optimizers.get("vae_tiling").apply(pipe, step, HERE)
    assert (
        optimizers.get("vae_tiling").verify(pipe, step, HERE).startswith("AutoencoderKL decodes in tiles of 64 pixels")
    )
    cut = draw(pipe, num_inference_steps=4)
    assert cut.shape == plain.shape
    assert 0 < np.abs(cut.astype(int) - plain).mean() < 8


def test_a_tile_is_seen_on_the_live_vae_and_goes_where_no_tile_is_asked_for(pipe: Any) -> None:
    module, spec = optimizers.get("vae_tiling"), optimizers.spec("vae_tiling")
    own = pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size
    module.apply(pipe, spec.step({"tile": 32}), HERE)
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size) == (32, 4)
    with pytest.raises(NotApplied, match="tile_sample_min_size is 32"):
        module.verify(pipe, spec.step({"tile": 64}), HERE)
    module.apply(pipe, spec.step(), HERE)
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size) == own
    assert module.verify(pipe, spec.step(), HERE)


def test_a_tile_that_a_vae_cannot_have_is_refused_with_the_nearest(pipe: Any) -> None:
    with pytest.raises(UsageError, match="cannot work in tiles of 40 pixels") as caught:
        tiles.set_sizes(pipe.vae, 40)
    assert "give 32 or 64" in str(caught.value)
    with pytest.raises(UsageError, match="is open"):
        optimizers.get("vae_tiling").apply(pipe, optimizers.spec("vae_tiling").step({"tile": "auto"}), HERE)


def test_a_vae_whose_tiles_are_not_known_is_refused() -> None:
    vae = made(
        "AutoencoderKLAllegro",
        {"in_channels": 3, "out_channels": 3, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
    )
    with pytest.raises(IncompatibleError, match="cannot be set"):
        tiles.set_sizes(vae, 256)


@pytest.mark.parametrize("tile", [0, -8, 5000, 12.5, "256", True])
def test_a_tile_is_a_number_of_pixels(tile: Any) -> None:
    with pytest.raises(UsageError, match="tile cannot be"):
        optimizers.spec("vae_tiling").step({"tile": tile})


def test_the_librarys_own_tile_is_the_same_trace_and_another_is_not() -> None:
    spec = optimizers.spec("vae_tiling")
    assert spec.step() == spec.step({"tile": None}) and dict(spec.step().params) == {}
    assert optimizers.changing([spec.step()]) == ()
    (changed,) = optimizers.changing([spec.step({"tile": 256})])
    model, request = model_of("stabilityai/stable-diffusion-xl-base-1.0"), Request(model="m")
    assert store.key(model, request, "float16", (changed,)) != store.key(model, request, "float16", ())


def test_a_dry_run_with_a_tile_records_the_way_in_those_tiles_beside_the_plain_one() -> None:
    from engine import facts

    model = facts.find("embedded")
    request = Request(model="embedded", height=128, width=128)
    step = optimizers.spec("vae_tiling").step({"tile": 32})
    usual = dryrun.trace(model, request, "float32")
    small = dryrun.trace(model, request, "float32", (step,))
    assert list(small.told()) == list(usual.told())  # the plain way
    assert [a.name for a in small.alternatives] == [a.name for a in usual.alternatives] == ["tiled"]
    assert len(small.alternatives[0].events) > 3 * len(usual.alternatives[0].events)


def test_tiles_worth_a_try_are_smaller_than_the_picture_and_not_the_librarys_own() -> None:
    sdxl = model_of("stabilityai/stable-diffusion-xl-base-1.0")
    assert (sdxl.tile_px, sdxl.tiles(1024, 1024), sdxl.tiles(256, 256)) == (1024, (512, 256), ())
    assert sdxl.tiling_starts(1024, 1024) is False and sdxl.tiling_starts(1024, 1024, 512) is True
    wan = model_of("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert (wan.tile_px, wan.tiles(720, 1280), wan.tiling_starts(480, 832)) == (256, (1024, 512), True)
    assert model_of("stabilityai/stable-cascade").tiles(1024, 1024) == ()
    assert sdxl.tiles(None, None) == () and sdxl.tiling_starts(None, None) is None
