"""Quantized weights under placements. Each test takes its own package, and is skipped without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.evidence import small
from truth import pipelines

PLACEMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "resident": ("resident", {}),
    "model_offload": ("model_offload", {}),
    "sequential_offload": ("sequential_offload", {}),
    "leaf": ("group_offload", {"use_stream": False}),
    "leaf, streamed": ("group_offload", {}),
    "block": ("group_offload", {"type": "block_level", "use_stream": False}),
}


def _linears(module: Any, multiple: int) -> Iterator[tuple[Any, str, Any]]:
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer.in_features % multiple == 0:
                yield parent, name, layer


def _bias(layer: Any) -> Any:
    return None if layer.bias is None else torch.nn.Parameter(layer.bias.detach(), requires_grad=False)


def quanto(module: Any) -> None:
    found = pytest.importorskip("optimum.quanto")
    found.quantize(module, weights=found.qint8)
    found.freeze(module)


def gguf(module: Any) -> None:
    found = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = found.GGMLQuantizationType.Q8_0
    for parent, name, layer in _linears(module, 32):
        made = GGUFLinear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=torch.float32
        )
        numbers = found.quants.quantize(layer.weight.detach().numpy(), kind).copy()
        made.weight = GGUFParameter(torch.from_numpy(numbers), quant_type=kind)
        if layer.bias is not None:
            made.bias = _bias(layer)
        setattr(parent, name, made)


def bnb_4bit(module: Any) -> None:
    found = pytest.importorskip("bitsandbytes")
    for parent, name, layer in _linears(module, 64):
        made = found.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        weight = found.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        made.weight = weight.to("cpu")
        if layer.bias is not None:
            made.bias = _bias(layer)
        setattr(parent, name, made)


def torchao(module: Any) -> None:
    found = pytest.importorskip("torchao.quantization")
    found.quantize_(module, found.Int8WeightOnlyConfig())


def _works(quantize: Callable[[Any], None], placed: str) -> bool:
    pipe, call = pipelines.made("sd3")
    quantize(pipe.transformer)
    name, params = PLACEMENTS[placed]
    try:
        small.apply(pipe, (name, params))
        small.draw(pipe, call | {"num_inference_steps": 1})
    except (TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


@pytest.mark.rule(
    "quanto-or-sequential-offload", "quanto-or-group-offload", "quantized-weights-go-with-whole-components"
)
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_quanto(counted: torch.device, placed: str) -> None:
    assert _works(quanto, placed) is (placed in ("resident", "model_offload"))


@pytest.mark.rule("quanto-or-casting")
def test_what_quanto_does_not_take() -> None:
    module = small.transformer()
    quanto(module)
    with pytest.raises(ValueError, match="cannot be changed"):
        small.cast(module)


@pytest.mark.rule("quanto-or-lora-on-flux", "quanto-or-fused-lora")
def test_a_lora_on_quanto() -> None:
    pytest.importorskip("peft")
    pipe, _ = pipelines.made("flux")
    weights = small.lora(pipe.transformer)
    quanto(pipe.transformer)
    with pytest.raises(KeyError):
        pipe.load_lora_weights(weights)
    pipe, call = pipelines.made("sd3")
    weights = small.lora(pipe.transformer)
    quanto(pipe.transformer)
    plain = small.draw(pipe, call)
    pipe.load_lora_weights(weights)
    assert not small.alike(small.draw(pipe, call), plain)
    pipe.fuse_lora()
    assert small.alike(small.draw(pipe, call), plain)  # it is lost


@pytest.mark.rule("gguf-or-sequential-offload", "quantized-weights-go-with-whole-components")
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_gguf(counted: torch.device, placed: str) -> None:
    assert _works(gguf, placed) is (placed != "sequential_offload")


@pytest.mark.rule("gguf-or-fused-lora")
def test_a_lora_is_not_fused_into_gguf() -> None:
    pytest.importorskip("peft")
    pipe, _ = pipelines.made("sd3")
    weights = small.lora(pipe.transformer)
    gguf(pipe.transformer)
    pipe.load_lora_weights(weights)
    with pytest.raises(RuntimeError, match="size"):
        pipe.fuse_lora()


@pytest.mark.rule("quantized-weights-are-not-cast")
def test_casting_passes_over_gguf() -> None:
    module = small.transformer()
    gguf(module)
    small.cast(module)
    assert module.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8


@pytest.mark.rule("quantized-weights-are-not-cast")
def test_casting_passes_over_torchao() -> None:
    module = small.transformer()
    torchao(module)
    small.cast(module)
    assert module.transformer_blocks[0].attn.to_q.weight.qdata.dtype == torch.int8


@pytest.mark.rule(
    "bnb-4bit-or-sequential-offload", "bnb-4bit-or-group-offload", "quantized-weights-go-with-whole-components"
)
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_bnb_4bit(counted: torch.device, placed: str) -> None:
    """Layers built by hand: the library's own loading wants a card."""
    assert _works(bnb_4bit, placed) is (placed in ("resident", "model_offload"))


@pytest.mark.rule("torchao-int8-goes-with-placements", "quantized-weights-go-with-whole-components")
@pytest.mark.parametrize("placed", PLACEMENTS)
def test_torchao(counted: torch.device, placed: str) -> None:
    assert _works(torchao, placed)


@pytest.mark.rule("torchao-or-groups-on-disk")
def test_torchao_is_not_kept_on_disk(counted: torch.device, tmp_path: Path) -> None:
    module = small.transformer()
    torchao(module)
    with pytest.raises(ValueError, match="Disk offloading is not supported"):
        small.group(module, stream=True, offload_to_disk_path=str(tmp_path))
