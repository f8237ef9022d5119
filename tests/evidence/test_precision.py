"""Which parts of a pipeline stay wide, which are widened, and what a card computes fast."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from engine import compat, gpus
from engine.facts import widening
from engine.optimizers import dtype
from tests.evidence import small
from truth import pipelines


@pytest.mark.rule("t5-keeps-its-wo-wide-in-float16")
@pytest.mark.parametrize(
    "cls", [transformers.T5EncoderModel, transformers.UMT5EncoderModel], ids=lambda c: str(c.__name__)
)
def test_t5_keeps_its_wo_wide_in_float16(tmp_path: Path, cls: Any) -> None:
    config = {
        transformers.T5EncoderModel: transformers.T5Config,
        transformers.UMT5EncoderModel: transformers.UMT5Config,
    }
    made = cls(config[cls](vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    made.save_pretrained(tmp_path)

    def wide(module: Any) -> set[str]:
        return {n for n, p in module.named_parameters() if p.dtype == torch.float32}

    half = cls.from_pretrained(tmp_path, dtype=torch.float16)
    assert len(wide(half)) == 2
    assert all(".wo." in n for n in wide(half))
    assert wide(cls.from_pretrained(tmp_path, dtype=torch.bfloat16)) == set()
    assert wide(cls.from_pretrained(tmp_path).to(torch.float16)) == set()
    assert cls.__name__ in small.listed("t5-keeps-its-wo-wide-in-float16")


@pytest.mark.rule("a-vae-in-another-precision-than-the-denoiser")
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_vae_in_another_precision_does_not_decode(counted: torch.device, name: str) -> None:
    pipe, call = pipelines.made(name)
    pipe.to(torch.float16)
    pipe.vae.to(torch.float32)
    pipe.to(counted)
    with pytest.raises(RuntimeError, match="Half"):
        small.draw(pipe, call | {"num_inference_steps": 1})


@pytest.mark.rule("which-vaes-ask-to-be-widened")
def test_which_vaes_ask_to_be_widened() -> None:
    asked = {
        n: inspect.signature(c.__init__).parameters["force_upcast"].default
        for n, c in small.models().items()
        if "force_upcast" in inspect.signature(c.__init__).parameters
    }
    assert {n for n, value in asked.items() if value} == {
        "AutoencoderKL",
        "AutoencoderKLAllegro",
        "AutoencoderKLCogVideoX",
        "AutoencoderKLTemporalDecoder",
    }
    assert {n for n, value in asked.items() if not value} == {"AutoencoderTiny", "VQModel"}
    for cls in (diffusers.StableDiffusionPipeline, diffusers.FluxPipeline, diffusers.StableDiffusion3Pipeline):
        source = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
        assert "force_upcast" not in source
        assert cls.__name__ not in widening.IN_FLOAT16 | widening.IN_ANY_PRECISION


@pytest.mark.rule("what-a-class-keeps-wide-is-kept-while-loading")
def test_what_a_class_keeps_wide_is_kept_while_loading(tmp_path: Path) -> None:
    module = pipelines.made("wan")[0].transformer
    module.save_pretrained(tmp_path)
    cls = type(module)

    def wide(module: Any) -> int:
        return sum(p.dtype == torch.float32 for p in module.parameters())

    assert wide(cls.from_pretrained(tmp_path, torch_dtype=torch.float16)) > 0
    assert wide(cls.from_pretrained(tmp_path).to(torch.float16)) == 0
    keeping = {n for n, c in small.models().items() if c._keep_in_fp32_modules}
    assert {"WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "CosmosTransformer3DModel"} <= keeping
    assert "FluxTransformer2DModel" not in keeping


@pytest.mark.rule("bfloat16-before-ampere")
def test_bfloat16_has_tensor_cores_from_ampere_on() -> None:
    """Read in the table of known cards, which has its sources; `auto` goes by the same bound."""
    since = tuple(map(int, _bound("bfloat16-before-ampere", "below").split(".")))
    for card in gpus.table():
        assert (card.bf16_tflops is not None) is (_capability(card) >= since), card.name
    assert since == dtype.BFLOAT16_SINCE
    assert (dtype.resolve_auto((7, 5)), dtype.resolve_auto(since)) == ("float16", "bfloat16")


@pytest.mark.rule("float16-on-pascal")
def test_which_cards_compute_float16_slower_than_float32() -> None:
    low, high = (_bound("float16-on-pascal", side) for side in ("at_least", "below"))
    for card in gpus.table():
        is_meant = low <= card.compute_capability < high
        assert (card.fp16_tflops < card.fp32_tflops) is is_meant, card.name


def _bound(rule: str, side: str) -> str:
    (found,) = (r for r in compat.rules() if r.id == rule)
    return str(found.when["compute_capability"][side])


def _capability(card: gpus.KnownGpu) -> tuple[int, ...]:
    return tuple(map(int, card.compute_capability.split(".")))
