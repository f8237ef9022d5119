"""torch.compile beside what puts hooks on a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_layerwise_casting
from torch._dynamo.utils import counters

from tests.evidence import small

HOOKED = ["sequential_offload", "leaf", "block", "block, streamed", "casting", "first_block"]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class _Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


class _Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([_Layers(), _Layers()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _hooked(how: str, where: torch.device, module: Any) -> Any:
    """Return a module with hooks of some kind."""
    match how:
        case "resident":
            module.to(where)
        case "model_offload":
            accelerate.cpu_offload_with_hook(module, where)
        case "sequential_offload":
            accelerate.cpu_offload(module, where)
        case "casting":
            apply_layerwise_casting(module.to(where), small.FP8, torch.float32)
        case "first_block":
            module.to(where).enable_cache(FirstBlockCacheConfig(threshold=0.1))
        case _:
            small.group(module, "block_level" if "block" in how else "leaf_level", stream="streamed" in how)
    return module


def _run(module: Any, where: torch.device) -> None:
    if isinstance(module, _Blocks):
        module(torch.ones(1, 8, device=where))
    elif module.is_cache_enabled:
        with module.cache_context("cond"):
            small.forward(module, where)
    else:
        small.forward(module, where)


@pytest.mark.rule(
    "one-graph-or-sequential-offload",
    "one-graph-or-group-offload",
    "one-graph-or-casting",
    "one-graph-or-a-cache",
    "one-graph-of-all-or-model-offload",
    "compiling-goes-with-resident",
)
@pytest.mark.parametrize("scope", ["whole", "regional"])
@pytest.mark.parametrize("how", ["resident", "model_offload", *HOOKED])
def test_what_compiles_into_one_graph(counted: torch.device, how: str, scope: str) -> None:
    is_small = scope == "whole" and how != "first_block"
    module = _hooked(how, counted, _Blocks() if is_small else small.transformer(blocks=1))
    (module.compile if scope == "whole" else module.compile_repeated_blocks)(backend="eager", fullgraph=True)
    if how == "resident" or (how == "model_offload" and scope == "regional"):
        _run(module, counted)
    else:
        with pytest.raises(Exception, match=r"(?i)unsupported|disable|skip|dynamo|data-dependent|parameter"):
            _run(module, counted)


def _breaks(how: str, where: torch.device) -> int:
    """Return in how many places compiling is given up, of four layers in two blocks."""
    module = _hooked(how, where, _Blocks())
    torch._dynamo.reset()
    counters.clear()
    module.compile(backend="eager")
    _run(module, where)
    return sum(counters["graph_break"].values())


@pytest.mark.rule("compiling-what-is-hooked-layer-by-layer", "compiling-goes-with-resident")
@pytest.mark.parametrize("how", ["sequential_offload", "leaf", "casting"])
def test_hooks_on_layers_break_the_graph_at_each(counted: torch.device, how: str) -> None:
    assert _breaks("resident", counted) == 0
    assert _breaks(how, counted) >= 4 > _breaks("model_offload", counted)


@pytest.mark.rule("blocks-are-compiled-one-by-one")
def test_blocks_are_compiled_between_their_hooks(counted: torch.device) -> None:
    assert 0 < _breaks("block", counted) < _breaks("leaf", counted)


@pytest.mark.rule("regions-need-repeated-blocks")
def test_a_model_that_names_no_blocks_is_not_compiled_by_regions() -> None:
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
    )
    with pytest.raises(ValueError, match="_repeated_blocks"):
        module.compile_repeated_blocks()
    named = {n for n, c in small.models().items() if getattr(c, "_repeated_blocks", None)}
    denoisers = {n for n in small.models() if "Transformer" in n or "UNet" in n or n == "I2VGenXLUNet"}
    assert denoisers - named == small.listed("regions-need-repeated-blocks")
