"""Group offload: what its arguments do, which classes it takes, what it holds."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import optimizers
from engine.errors import IncompatibleError
from engine.optimizers.spec import Context
from tests.evidence import small
from truth import device, pipelines


@pytest.mark.rule("some-classes-refuse-group-offload")
def test_the_classes_that_refuse_group_offload(counted: torch.device) -> None:
    import diffusers

    refusing = {n for n, c in small.models().items() if not getattr(c, "_supports_group_offloading", True)}
    assert refusing == small.listed("some-classes-refuse-group-offload")
    module = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=2)
    with pytest.raises(ValueError, match="does not support group offloading"):
        small.group(module)
    pipe, _ = pipelines.made("pixart")
    pipe.register_modules(vae=module)
    with pytest.raises(IncompatibleError, match="group_offload cannot act on vae"):
        optimizers.get("group_offload").apply(
            pipe, optimizers.spec("group_offload").step(), Context(device=device.NAME, dtype="float32")
        )


def _flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    ).eval()


@pytest.mark.rule("a-vae-is-not-grouped-by-block")
@pytest.mark.parametrize("stream", [True, False])
def test_a_vae_in_blocks_does_not_decode(counted: torch.device, stream: bool) -> None:
    given = small.latents(16).to(counted)
    with_blocks = {n for n, c in small.models().items() if getattr(c, "_group_offload_block_modules", None)}
    assert with_blocks == {
        "AutoencoderKL",
        "AutoencoderKLQwenImage21",
        "AutoencoderKLWan",
        "RFD4ProteinaAutoencoder",
    }
    module = small.vae()
    small.group(module, "block_level", stream=stream)
    module.decode(given)
    module = _flux2_vae()
    small.group(module, "block_level", stream=stream)
    with pytest.raises(RuntimeError, match="same device"):
        module.decode(given)
    module = _flux2_vae()
    small.group(module, "block_level", stream=stream, block_modules=[n for n, _ in module.named_children()])
    module.decode(given)


@pytest.mark.rule("a-vae-is-grouped-by-leaf")
@pytest.mark.parametrize("name", ["pixart", "wan", "sana", "ltx", "qwen_image", "mochi", "hunyuan_video", "cogvideox"])
@pytest.mark.parametrize("stream", [True, False])
def test_every_vae_decodes_in_leaves(counted: torch.device, name: str, stream: bool) -> None:
    pipe, _ = pipelines.made(name)
    channels = pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim
    is_video = name not in ("pixart", "sana")
    given = torch.randn(1, channels, *([1] if is_video else []), 4, 4, generator=torch.Generator().manual_seed(0))
    plain = pipe.vae.decode(given).sample
    small.group(pipe.vae, stream=stream)
    assert small.alike(pipe.vae.decode(given.to(counted)).sample.cpu(), plain)


@pytest.mark.rule("a-streamed-vae-does-not-prefetch")
def test_a_streamed_vae_copies_nothing_ahead(counted: torch.device) -> None:
    module, given = small.vae(), small.latents().to(counted)
    small.group(module, stream=True)
    module.decode(given)
    order = module._diffusers_hook.get_hook("lazy_prefetch_group_offloading").execution_order
    once = len(order)
    module.decode(given)
    assert len(order) == 2 * once > 0
    hooks = [m._diffusers_hook.get_hook("group_offloading") for m in module.modules() if hasattr(m, "_diffusers_hook")]
    assert all(h is None or h.next_group is None for h in hooks)


@pytest.mark.rule("tiles-under-streamed-groups")
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_tiles_of_a_streamed_vae_are_right(counted: torch.device, kind: str) -> None:
    plain, module, given = small.vae(), small.vae(), small.latents(32)
    plain.enable_tiling()
    module.enable_tiling()
    small.group(module, kind, stream=True)
    for _ in range(2):
        assert small.alike(module.decode(given.to(counted)).sample.cpu(), plain.decode(given).sample)


@pytest.mark.rule("block-groups-keep-a-text-encoder-whole")
@pytest.mark.parametrize("made", [small.t5, small.clip])
def test_a_text_encoder_in_blocks_is_on_the_device_whole(counted: torch.device, made: Any) -> None:
    given, taken = small.ids().to(counted), {}
    for kind in ("block_level", "leaf_level"):
        module = made()
        small.group(module, kind)
        taken[kind] = small.peak(partial(module, given))
    assert taken["block_level"] >= small.nbytes(made()) > 1.3 * taken["leaf_level"]


@pytest.mark.rule("block-groups-keep-a-text-encoder-whole")
def test_the_text_encoders_that_have_no_list_of_blocks() -> None:
    """Those of the catalogue: a group is made of a list among a module's own children."""
    import transformers

    def lists(cls: str) -> bool:
        config = getattr(transformers, cls).config_class()
        with torch.device("meta"):
            module = getattr(transformers, cls)(config)
        return any(isinstance(c, torch.nn.ModuleList | torch.nn.Sequential) for c in module.children())

    for cls in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "UMT5EncoderModel"):
        assert cls in small.listed("block-groups-keep-a-text-encoder-whole")
        assert not lists(cls), cls


@pytest.mark.rule("blocks-need-their-number", "a-stream-records-what-it-streams", "streams-need-an-accelerator")
def test_arguments_that_are_refused(counted: torch.device) -> None:
    with pytest.raises(ValueError, match="must be provided"):
        small.transformer().enable_group_offload(counted, offload_type="block_level")
    with pytest.raises(ValueError, match="record_stream"):
        small.group(small.transformer(), record_stream=True)
    with pytest.raises(ValueError, match="requires an onload device"):
        small.transformer().enable_group_offload(small.CPU, offload_type="leaf_level", use_stream=True)


@pytest.mark.rule("a-stream-takes-one-block")
def test_a_stream_takes_one_block(counted: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.WARNING)  # a run that came before may have quietened it
    logger.addHandler(caplog.handler)
    try:
        small.group(small.transformer(), "block_level", stream=True, num_blocks_per_group=2)
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    assert "Setting it to 1" in caplog.text

    def taken(**more: Any) -> int:
        module = small.transformer(blocks=4)
        small.group(module, "block_level", **more)
        given = small.inputs(counted)
        module(**given)
        return small.peak(lambda: module(**given))

    assert taken(stream=True, num_blocks_per_group=2) == taken(stream=True)
    assert taken(num_blocks_per_group=2) > taken()


@pytest.mark.rule("leaves-are-not-counted-in-blocks", "only-a-stream-is-asynchronous")
def test_arguments_that_are_taken_and_not_used(counted: torch.device) -> None:
    def taken(**more: Any) -> tuple[int, int]:
        before, module = small.pinned(), small.transformer()
        small.group(module, **more)
        given = small.inputs(counted)
        return small.peak(lambda: module(**given)), small.pinned() - before

    plain = taken()
    many = small.transformer()
    small.group(many, "block_level", num_blocks_per_group=99)
    small.forward(many, counted)
    assert taken(num_blocks_per_group=9) == taken(low_cpu_mem_usage=True) == taken(non_blocking=True) == plain


@pytest.mark.rule("a-stream-pins-what-it-streams", "recorded-streams-synchronise-less")
def test_what_a_stream_pins_and_waits_for(counted: torch.device) -> None:
    def seen(**more: Any) -> tuple[int, int, int]:
        before, module = small.pinned(), small.transformer()
        small.group(module, stream=True, **more)
        held, given = small.pinned() - before, small.inputs(counted)
        module(**given)
        start = device.counts()
        module(**given)
        end = device.counts()
        return held, end.synchronisations - start.synchronisations, end.streamed - start.streamed

    weights = small.nbytes(small.transformer())
    plain, recorded, frugal = seen(), seen(record_stream=True), seen(low_cpu_mem_usage=True)
    assert plain[0] == recorded[0] == weights
    assert frugal[0] == 0
    assert recorded[1] < 0.6 * plain[1]
    assert (plain[2], recorded[2]) == (0, len(list(small.transformer().parameters())))


@pytest.mark.rule("streamed-blocks-leave-the-rest-unstreamed")
def test_what_is_in_no_block_is_not_streamed(counted: torch.device) -> None:
    before, module = small.pinned(), small.transformer()
    small.group(module, "block_level", stream=True)
    blocks = small.nbytes(module.transformer_blocks) + small.nbytes(module.single_transformer_blocks)
    assert small.pinned() - before == blocks < small.nbytes(module)
    given = small.inputs(counted)
    first = small.peak(lambda: module(**given))
    later = small.peak(lambda: module(**given))
    assert later - first > 0.5 * small.nbytes(module.transformer_blocks[0])  # this one and the next


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x) * self.get_buffer("table")[0]
        return out


class _Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([_Block(), _Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.rule("buffers-of-streamed-blocks-stay")
@pytest.mark.parametrize(
    ("kind", "stream", "stays"),
    [("block_level", True, True), ("block_level", False, False), ("leaf_level", True, False)],
)
def test_where_buffers_are_after_a_forward(counted: torch.device, kind: str, stream: bool, stays: bool) -> None:
    module = _Blocks()
    small.group(module, kind, stream=stream)
    module(torch.ones(1, 8, device=counted))
    (table, _) = module.buffers()
    assert table.device.type == (device.NAME if stays else "cpu")


@pytest.mark.rule("a-hook-on-a-streamed-block-is-dropped")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_later_hook_on_a_streamed_block_is_dropped(counted: torch.device, is_first: bool) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    seen = []

    class Counted(ModelHook):  # type: ignore[misc]
        def new_forward(self, module: Any, *args: Any, **given: Any) -> Any:
            seen.append(1)
            return self.fn_ref.original_forward(*args, **given)

    module = small.transformer()

    def register() -> None:
        HookRegistry.check_if_exists_or_initialize(module.transformer_blocks[1]).register_hook(Counted(), "counted")

    if is_first:
        register()
    small.group(module, "block_level", stream=True)
    if not is_first:
        register()
    small.forward(module, counted)
    small.forward(module, counted)
    assert len(seen) == (2 if is_first else 1)


@pytest.fixture
def _read_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors knows no counted device: read to the host, then move."""
    import safetensors.torch

    plain = safetensors.torch.load_file

    def load_file(path: Any, device: Any = "cpu") -> dict[str, torch.Tensor]:
        return {n: t.to(device) for n, t in plain(path).items()}

    monkeypatch.setattr(safetensors.torch, "load_file", load_file)


def _on_disk(module: Any, folder: Path, kind: str = "leaf_level") -> Any:
    small.group(module, kind, stream=True, offload_to_disk_path=str(folder))
    return module


@pytest.mark.usefixtures("_read_to_the_device")
@pytest.mark.rule("one-folder-on-disk-for-each-component", "files-on-disk-are-not-written-again")
def test_a_folder_on_disk_is_of_one_module(counted: torch.device, tmp_path: Path) -> None:
    one, other = small.forward(small.transformer(0)), small.forward(small.transformer(1))
    _on_disk(small.transformer(0), tmp_path / "a")
    assert small.alike(small.forward(_on_disk(small.transformer(1), tmp_path / "a"), counted), one)
    assert small.alike(small.forward(_on_disk(small.transformer(1), tmp_path / "b"), counted), other)


@pytest.mark.usefixtures("_read_to_the_device")
@pytest.mark.rule("tied-embeddings-are-lost-on-disk")
def test_a_tied_embedding_is_lost_on_disk(counted: torch.device, tmp_path: Path) -> None:
    given = small.ids()
    plain = small.t5()(given)[0]
    leaves = _on_disk(small.t5(), tmp_path / "leaves")(given.to(counted))[0].cpu()
    assert not small.alike(leaves, plain, 1e-2)
    blocks = _on_disk(small.t5(), tmp_path / "blocks", "block_level")(given.to(counted))[0].cpu()
    assert small.alike(blocks, plain)
    module = small.t5()
    small.group(module, stream=True)
    assert small.alike(module(given.to(counted))[0].cpu(), plain)


@pytest.mark.usefixtures("_read_to_the_device")
@pytest.mark.rule("casting-before-groups-on-disk")
@pytest.mark.parametrize("is_first", [True, False])
def test_casting_after_groups_are_on_disk_is_ignored(counted: torch.device, tmp_path: Path, is_first: bool) -> None:
    plain, cast = small.transformer(), small.transformer()
    small.cast(cast)
    module = small.transformer()
    if is_first:
        small.cast(module)
    _on_disk(module, tmp_path)
    if not is_first:
        small.cast(module)
    assert small.alike(small.forward(module, counted), small.forward(cast if is_first else plain))
