"""One case of the GPU harness, measured in this process on the CPU, whose bytes a stand-in claims to count."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from bench.gpu import case as cases
from bench.gpu import device as devices
from bench.gpu import machine, machines, matrix, phases, predict, sampling, weights
from bench.gpu.case import Order
from bench.gpu.device import Counted, Cuda, Device
from bench.gpu.matrix import Case
from engine import facts, paths
from engine.estimate.trace import Work
from engine.units import GIB
from tests.test_dryrun import dry
from truth import pipelines


class Counter:
    """Stands in for torch's module of a device: what is allocated is how often somebody waited for it."""

    def __init__(self) -> None:
        self.waits = 0
        self.most = 0
        self.caps: list[int] = []
        self.full_after: int | None = None

    def synchronize(self) -> None:
        self.waits += 1
        self.most = max(self.most, self.waits)
        if self.full_after is not None and self.waits > self.full_after:
            raise torch.OutOfMemoryError("the stand-in is full")

    def memory_allocated(self) -> int:
        return self.waits

    def memory_reserved(self) -> int:
        return self.waits

    def max_memory_allocated(self) -> int:
        return self.most

    def max_memory_reserved(self) -> int:
        return self.most + 1000

    def reset_peak_memory_stats(self) -> None:
        self.most = 0

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self) -> tuple[int, int]:
        return 8 * GIB, 8 * GIB

    def set_capacity(self, size: int) -> None:
        self.caps.append(size)

    @property
    def pinned_peak_bytes(self) -> int:
        return 77

    def device(self) -> Device:
        """Return the device that this counts for: the CPU, so that everything can be computed."""
        return Counted("cpu", self, self, lambda: self)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    made = Counter()
    monkeypatch.setattr(devices, "opened", lambda *, dry: made.device())
    return made


def order(kind: str = "exact", ending: str = "resident", **more: Any) -> Order:
    """Return the order of a case of the dry set; its plan is for a card that is not here."""
    case = next(c for c in matrix.cases("dry") if c.kind == kind and c.id.endswith(ending))
    case = Case.of({**case.plain(), "steps": 2})
    plan = predict.plan_of(case, machines.hardware(True)) if case.optimizers else None
    told = {"case": case.plain(), "plan": plan and predict.plain(plan), "card_bytes": case.budget_bytes}
    return Order(**{**told, "dry": True, **more})


def test_a_case_is_measured_phase_by_phase_in_two_calls(counter: Counter) -> None:
    outcome = cases.measure(order(cap_bytes=GIB))
    assert (outcome.status, outcome.because) == ("measured", None)
    found = outcome.measured
    assert [p["name"] for p in found["load"]] == ["load"]
    assert [[p["name"] for p in c["phases"]] for c in found["calls"]] == [["start", "encode", "denoise", "decode"]] * 2
    assert all(c["seconds"] > 0 and len(c["step_seconds"]) == 1 for c in found["calls"])
    peaks = [p["allocated_bytes"] for c in found["calls"] for p in c["phases"]]
    assert peaks == sorted(set(peaks)), "each phase has its own peak"
    assert all(p["reserved_bytes"] == p["allocated_bytes"] + 1000 for p in found["calls"][0]["phases"])
    assert found["host"]["peak_bytes"] > found["host"]["anonymous_bytes"] > 0
    assert found["host"]["pinned_bytes"] == 77
    assert counter.caps == [GIB, -1]


def test_a_phase_has_its_own_peak_and_comes_again_under_a_number() -> None:
    counter = Counter()
    watch = phases.Watch(counter.device(), sampling.Sampler())
    watch.begin("start")
    for kind, waits in (("denoise", 500), ("decode", 100), ("denoise", 50)):
        watch.enter(kind)
        watch.enter(kind)
        counter.waits = waits
    found = watch.end()
    assert [p.name for p in found] == ["start", "denoise", "decode", "denoise.2"]
    assert [p.allocated_bytes for p in found[1:]] == [501, 101, 51]


def test_a_second_call_that_would_be_cut_off_is_not_begun(counter: Counter) -> None:
    assert len(cases.measure(order(limit_s=0.0)).measured["calls"]) == 1


def test_running_out_of_memory_is_an_answer_with_its_phase(counter: Counter) -> None:
    waits = []
    for full_after in (1, 3, 5):
        counter.waits, counter.full_after = 0, full_after
        outcome = cases.measure(order())
        assert outcome.status == "oom" and outcome.because == "OutOfMemoryError: the stand-in is full"
        waits.append(outcome.phase)
        assert outcome.measured["peaks_at_the_end"]["reserved_bytes"] >= 1000
        assert "host" in outcome.measured and "at_rest" in outcome.measured
    assert waits == ["load", "start", "denoise"]


def test_a_recipe_is_run_without_a_plan(counter: Counter) -> None:
    outcome = cases.measure(order("recipe", "resident/8GiB"))
    assert outcome.status == "measured", outcome.because
    assert len(outcome.measured["calls"]) == 2


def test_what_fails_otherwise_says_what_it_was(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("two\n  lines")

    monkeypatch.setattr(weights, "weightless", broken)
    outcome = cases.measure(order())
    assert (outcome.status, outcome.because, outcome.phase) == ("failed", "ValueError: two lines", "load")
    assert outcome.measured["where"][-1].startswith("test_bench_gpu_case.py:")


@pytest.mark.parametrize("name", ["sd_img2img", "sdxl", "wan", "flux"])
def test_phases_are_those_of_the_dry_run(name: str) -> None:
    pipe, call = pipelines.made(name)
    watch = phases.Watch(Counter().device(), sampling.Sampler())
    with phases.marked(pipe, watch), torch.no_grad():
        watch.begin(phases.BEFORE)
        pipe(**call)
        found = watch.end()
    for part in pipe.components.values():  # the marks are taken off
        assert not {"encode", "decode", "step"} & set(getattr(part, "__dict__", {}))
        assert not getattr(part, "_forward_pre_hooks", None)
    assert [p.name for p in found[1:]] == list(dry(pipe, call).phases)
    assert found[0].name == phases.BEFORE


# --- weights ---


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_random_weights_have_the_shapes_and_dtypes_of_loaded_ones(dtype: str) -> None:
    loaded = DiffusionPipeline.from_pretrained(paths.embedded_model_dir(), dtype=getattr(torch, dtype))
    made = weights.pipeline(facts.find(None), dtype, "cpu")
    for name, part in loaded.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        other = made.components[name]
        assert _described(other.named_parameters()) == _described(part.named_parameters()), name
        assert _described(other.named_buffers()) == _described(part.named_buffers()), name
        for key, buffer in part.named_buffers():
            assert torch.equal(dict(other.named_buffers())[key], buffer), key


def _described(named: Any) -> dict[str, Any]:
    return {k: (tuple(v.shape), v.dtype, v.device.type, v.stride()) for k, v in named}


def test_tied_weights_are_there_once() -> None:
    made = weights.pipeline(facts.find(None), "float32", "cpu")
    encoder = made.text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_random_weights_give_numbers() -> None:
    made = weights.pipeline(facts.find(None), "float16", "cpu")
    spread = [w.float().std().item() for w in made.transformer.parameters() if w.dim() > 1 and w.numel() > 5000]
    assert spread and all(0.9 * weights.SCALE < s < 1.1 * weights.SCALE for s in spread)
    assert all(w.isfinite().all() for c in (made.vae, made.transformer) for w in c.parameters())


# --- what is asked of a device, and of NVML ---


def test_a_card_looks_smaller_while_it_is_capped() -> None:
    class Card(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.fractions: list[float] = []

        def set_per_process_memory_fraction(self, share: float) -> None:
            self.fractions.append(share)

        def get_device_properties(self, index: int = 0) -> Any:
            return type("P", (), {"total_memory": 8 * GIB, "name": "X"})()

    module = Card()
    device = Cuda("cuda", module)
    with device.capped(3 * GIB, 4 * GIB):
        assert module.fractions == [3 / 8]
        assert module.mem_get_info() == (4 * GIB, 4 * GIB)
        shown = module.get_device_properties(0)
        assert (shown.total_memory, shown.name) == (4 * GIB, "X")
    assert module.fractions[-1] == 1.0
    assert module.mem_get_info() == (8 * GIB, 8 * GIB)
    assert module.get_device_properties(0).total_memory == 8 * GIB


def test_the_sampler_keeps_the_most_of_each_stretch() -> None:
    shown = [sampling.Sample(1, None), sampling.Sample(9, 20), sampling.Sample(4, 30), sampling.Sample(5, 6)]
    sampler = sampling.Sampler(lambda: shown.pop(0))
    sampler.look()
    sampler.look()
    assert sampler.taken() == sampling.Sample(9, 30)
    assert sampler.taken() == sampling.Sample(5, 30), "what is there at its beginning belongs to a stretch"


def test_the_sampler_looks_by_itself() -> None:
    looks = []

    def look() -> sampling.Sample:
        looks.append(1)
        return sampling.Sample(1, 1)

    with sampling.Sampler(look).running():
        time.sleep(0.2)
    assert len(looks) > 2


def test_without_nvml_nothing_is_seen_and_nothing_breaks() -> None:
    sampler = sampling.of_card("GPU-none")
    with sampler.running():
        assert sampler.taken() == sampling.Sample(None, None)


# --- the measures of a machine ---


def test_a_convolutions_workspace_is_what_its_tensors_are_not() -> None:
    work = Work("conv", "float32", (1, 4, 6, 1, 0, 9, 8, 3, 3, 2, 1, 1, 1, 5, 8), 0)
    found = machine._convolution(Counter().device(), work, (8, 9))
    assert found["predicted_bytes"] is not None and found["seconds"] > 0 and found["kernels"] is None
    # The stand-in's bytes grow by one for each wait; 6 x 5 x 8 floats are the output.
    assert found["bytes"] == 1 - 6 * 5 * 8 * 4


def test_an_odd_convolution_is_passed_over_with_its_reason() -> None:
    transposed = Work("conv", "float32", (1, 4, 6, 1, 1, 9, 8, 3, 3, 1, 1, 1, 1, 9, 8), 0)
    assert "transposed" in machine._convolution(Counter().device(), transposed, None)["because"]
    lopsided = Work("conv", "float32", (1, 4, 6, 1, 0, 9, 8, 2, 2, 1, 1, 1, 1, 9, 8), 0)
    assert "one side" in machine._convolution(Counter().device(), lopsided, None)["because"]


def test_a_backend_that_does_not_run_says_why() -> None:
    found = machine._attention(Counter().device(), Work("attention", "float32", (1, 2, 16, 16, 8, 1), 0), None, None)
    assert set(found["backends"]) == {"default", "flash", "efficient", "cudnn", "math"}
    assert found["backends"]["math"]["seconds"] > 0
    assert found["backends"]["cudnn"]["because"]
