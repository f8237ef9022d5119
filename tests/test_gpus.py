"""The table of known cards: complete, consistent, and found by how people write names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import engine
from engine import gpus
from engine.errors import UsageError
from engine.units import GIB
from engine.values import Gpu
from tests.conftest import card, machine

ROWS = gpus.table()
ARCHITECTURES = {
    "Pascal": ("6.0", "6.1"),
    "Volta": ("7.0",),
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6", "8.7"),
    "Ada Lovelace": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "10.3", "11.0", "12.0", "12.1"),
}


def test_there_are_enough_cards_of_every_architecture() -> None:
    assert len(ROWS) >= 80
    assert {r.architecture for r in ROWS} == set(ARCHITECTURES)
    assert len({r.name for r in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_row_is_consistent(row: gpus.KnownGpu) -> None:
    assert row.compute_capability in ARCHITECTURES[row.architecture]
    assert row.source
    assert row.confidence in ("stated", "derived")
    assert all(0 < size <= 512 for size in row.memory_gib)
    cores = row.multiprocessors * (64 if row.compute_capability in ("6.0", "7.0", "7.5", "8.0") else 128)
    assert row.fp32_tflops == pytest.approx(cores * row.boost_mhz * 2e-6, rel=0.03)
    version = tuple(map(int, row.compute_capability.split(".")))
    assert (row.bf16_tflops is None) == (row.tf32_tflops is None) == (version < (8, 0))
    assert (row.fp8_tflops is None) == (version < (8, 9))
    if row.bf16_tflops is not None:
        assert row.bf16_tflops == row.fp16_tflops
        assert row.tf32_tflops == pytest.approx(row.fp16_tflops / 2, rel=0.02)
    if row.fp8_tflops is not None:
        assert row.fp8_tflops == pytest.approx(row.fp16_tflops * 2, rel=0.02)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_a_card_is_found_by_what_nvml_calls_it(row: gpus.KnownGpu) -> None:
    seen = Gpu(
        index=0,
        name=f"NVIDIA {row.nvml_name}",
        uuid=None,
        arch=row.compute_capability,
        total_bytes=int(row.memory_gib[0] * 0.985 * GIB),
        free_bytes=None,
    )
    found = gpus.row_of(seen)
    assert found is not None
    assert found.name == row.name
    rates = gpus.rates(seen)
    assert rates is not None
    assert rates.basis.startswith("table")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("RTX 4090", "GeForce RTX 4090"),
        ("rtx4090", "GeForce RTX 4090"),
        ("4090", "GeForce RTX 4090"),
        ("nvidia-geforce-rtx-4090", "GeForce RTX 4090"),
        ("4070 ti super", "GeForce RTX 4070 Ti SUPER"),
        ("RTX 3080 12GB", "GeForce RTX 3080 12GB"),
        ("3080", "GeForce RTX 3080"),
        ("A100", "A100-SXM4-80GB"),
        ("A100 40GB", "A100-SXM4-40GB"),
        ("H100 PCIe", "H100 PCIe"),
        ("H100", "H100 80GB HBM3"),
        ("RTX 6000 Ada", "RTX 6000 Ada Generation"),
        ("T4", "Tesla T4"),
        ("1080ti", "GeForce GTX 1080 Ti"),
        ("5090 laptop", "GeForce RTX 5090 Laptop GPU"),
    ],
)
def test_how_people_write_it(written: str, meant: str) -> None:
    assert [r.name for r in gpus.named(written)] == [meant]


def test_a_hypothetical_card_has_the_tables_facts() -> None:
    plan = engine.resolve(gpu="rtx 4090", vram="22GiB", hardware=machine())
    assert plan.card is not None
    assert (plan.card.arch, plan.card.total_bytes, plan.card.free_bytes) == ("8.9", 24 * GIB, 22 * GIB)
    assert plan.card.hypothetical
    assert str(plan.optimizers[0]) == "dtype: bfloat16"
    assert str(engine.resolve(gpu="2080 Ti", hardware=machine()).optimizers[0]) == "dtype: float16"
    whole = engine.resolve(gpu="4060 Ti 16GB", hardware=machine())
    assert whole.card is not None
    assert whole.card.free_bytes == 16 * GIB
    assert [n for n in whole.hardware.notes if "wholly free" in n]


def test_a_card_that_nobody_knows() -> None:
    with pytest.raises(UsageError) as caught:
        engine.resolve(gpu="RTX 4900", hardware=machine())
    assert "here or in the table of known cards" in caught.value.what
    assert "GeForce RTX 4090" in caught.value.do
    imagined = engine.resolve(gpu="Voodoo 9", vram="12GiB", hardware=machine())
    assert imagined.card is not None
    assert (imagined.card.name, imagined.card.arch) == ("Voodoo 9", None)


def test_a_card_of_its_own_is_not_taken_for_a_like_named_one_that_is_here() -> None:
    here = machine(card(11, name="NVIDIA GeForce RTX 4070 Ti"))
    other = engine.resolve(gpu="4070", hardware=here)
    assert other.card is not None
    assert (other.card.name, other.card.hypothetical) == ("GeForce RTX 4070", True)
    same = engine.resolve(gpu="4070 ti", hardware=here)
    assert same.card is not None
    assert not same.card.hypothetical


def test_links() -> None:
    assert gpus.link_bytes_per_s(4, 16) == pytest.approx(31.5e9, rel=0.01)
    assert gpus.link_bytes_per_s(None, 16) is gpus.link_bytes_per_s(4, None) is gpus.link_bytes_per_s(99, 16) is None


def test_every_source_key_is_used_and_every_row_has_one() -> None:
    content = json.loads((Path(gpus.__file__).parent / "table.json").read_text(encoding="utf-8"))
    used = {entry["source"] for entry in content["gpus"]}
    assert set(content["sources"]) <= used
