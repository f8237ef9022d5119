"""The scenario reader: what differs is said in words, and a bad file with its places."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import scenarios
from engine.errors import FileError
from tests.conftest import write

pytestmark = pytest.mark.usefixtures("no_estimates")
GOOD = """\
why: a reason
hardware: {free_vram: 11.6GiB, arch: "7.5", host_ram: 16GiB}
request: {batch: 2}
expect:
  profile: [low, medium]
  fits: null
  contains: ["dtype: float16", vae_slicing]
  absent: [vae_tiling]
  notes: [not_estimated]
rejected: {max: match.free_vram}
"""


def differences(folder: Path, text: str) -> tuple[str, ...]:
    return scenarios.run(scenarios.load(write(folder, "case.yaml", text))).differences


def test_what_is_as_expected_differs_in_nothing(tmp_path: Path) -> None:
    assert differences(tmp_path, GOOD) == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[low, medium]", "max", "profile: max is expected, and it is low"),
        ("fits: null", "fits: true", "fits: true is expected, and it is null"),
        ("vae_slicing]", "fuse_qkv]", "contains: fuse_qkv is not in [dtype: float16, vae_slicing, model_offload]"),
        ("absent: [vae_tiling]", "absent: [model_offload]", "absent: model_offload is in [dtype: float16,"),
        ("notes: [not_estimated]", "notes: [no such]", "notes: 'no such' is not among ["),
        ("fits: null", "required_at_most: 1GiB", "at most 1.00 GiB is expected, and what it takes is not known"),
        ("fits: null", "error: no way", "error: 'no way' is expected, and the request is answered"),
        ("max: match.free_vram", "max: forbid", "rejected: max for forbid is expected, and it is match.free_vram"),
        ("{max: ", "{nobody: ", "and it is not rejected"),
        ("{batch: 2}", "{batch: 0}", "it is refused: batch is 0"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    (difference,) = differences(tmp_path, GOOD.replace(old, new))
    assert said in difference


def test_a_refusal_can_be_expected(tmp_path: Path) -> None:
    text = "why: x\nhardware: {}\nrequest: {batch: 0}\nexpect: {error: batch is 0}\n"
    assert differences(tmp_path, text) == ()


@pytest.mark.parametrize(
    ("hardware", "free_gib", "name"),
    [
        ('{gpu: "RTX 4090"}', 24.0, "GeForce RTX 4090"),
        ('{gpu: "RTX 4090", free_vram: 20GiB}', 20.0, "GeForce RTX 4090"),
        ("{gpu: ours, free_vram: 20GiB}", 20.0, "ours"),
        ("{free_vram: 20GiB, total_vram: 40GiB, driver_model: WDDM}", 20.0, "Test Card"),
        ("{free_vram: null}", None, "Test Card"),
    ],
)
def test_the_machine_is_the_one_described(tmp_path: Path, hardware: str, free_gib: float | None, name: str) -> None:
    text = f"why: x\nhardware: {hardware}\nexpect: {{absent: [xdit]}}\n"
    plan = scenarios.run(scenarios.load(write(tmp_path, "case.yaml", text))).plan
    assert plan is not None
    (card,) = plan.hardware.gpus
    assert card.name == name
    assert card.free_bytes == (None if free_gib is None else free_gib * 2**30)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch: 2", "batsh: 2", "3:11: unknown key 'batsh'"),
        ("11.6GiB", "11.6", "2:23: "),
        ("16GiB", "0GiB", "2:55: '0GiB' is out of range"),
        ('"7.5"', "7.5", "2:38: "),
        ("free_vram: 11.6GiB, ", "", "arch describes a card without a name, and there is none"),
        ('free_vram: 11.6GiB, arch: "7.5"', 'gpu: "RTX 4090", free_vram: null', "a known card's free_vram is a size"),
        ("why: a reason\n", "", "the key 'why' is missing"),
    ],
)
def test_a_bad_scenario_is_told_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(FileError) as caught:
        scenarios.load(write(tmp_path, "case.yaml", GOOD.replace(old, new, 1)))
    assert said in caught.value.why


def test_a_scenario_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        scenarios.load(tmp_path / "none.yaml")
