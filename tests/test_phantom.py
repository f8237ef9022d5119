"""The parts of `truth/phantom` that need no CUDA build of torch, and what was committed of its results."""

from __future__ import annotations

import json
from pathlib import Path

from truth.phantom import build
from truth.phantom.__main__ import environment
from truth.phantom.matrix import PLACEMENTS, Case, cases

RESULTS = Path(__file__).parents[1] / "truth/results/phantom.jsonl"


def test_what_is_asked_and_not_played_says_so_and_fails_but_for_products() -> None:
    source = build.unplayed({"cudaGraphLaunch", "cudaMalloc", "cublasSgemm_v2", "cudnnRNNForward"}, {"cudaMalloc"})
    assert source.splitlines()[1:] == [
        "int cublasSgemm_v2(void) { return 0; }",
        'int cudaGraphLaunch(void) { phantom_unplayed("cudaGraphLaunch"); return 801; }',
        'int cudnnRNNForward(void) { phantom_unplayed("cudnnRNNForward"); return 3000; }',
    ]


def test_cases_are_every_combination_and_travel_as_json() -> None:
    made = list(cases("tiny", ["sd", "flux"], list(PLACEMENTS), ["float32"], ["vae_tiling"]))
    assert len(made) == 2 * len(PLACEMENTS)
    assert [Case.of(json.loads(json.dumps(c.json()))) for c in made] == made


def test_the_device_is_put_before_what_torch_would_load() -> None:
    made = environment([Path("a/libphantom.so"), Path("a/libcuda.so.1")], {"DG_PHANTOM_CARD": "T4"})
    assert made["LD_PRELOAD"] == "a/libphantom.so:a/libcuda.so.1"
    assert made["DG_PHANTOM_CARD"] == "T4"


def test_the_committed_results_say_of_themselves_what_they_are() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    compared = [r for r in lines if "executed" in r]
    assert len(compared) > 250
    for result in compared:
        assert result["is_equal"] is (result["predicted"] == result["executed"])
    equal = sum(r["is_equal"] for r in compared)
    assert equal > 0.95 * len(compared)
    for result in compared:  # and the rest by less than a hundredth
        said, did = (max(result[k]["allocated_bytes"].values()) for k in ("predicted", "executed"))
        assert abs(said - did) <= 0.01 * did or result["card"] == "T4", result
