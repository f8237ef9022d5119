"""The dry run against the truth: the same storages, in the same order, as a real run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import engine
from engine import facts, optimizers
from engine.dryrun import build, record, run, twins
from engine.dryrun.follow import Follower
from engine.dryrun.operators import Target
from engine.errors import IncompatibleError
from engine.estimate import placements, store, stream
from engine.estimate.trace import Event, Trace
from engine.units import GIB, MIB
from engine.values import Request
from tests.architectures import architectures
from tests.conftest import card, machine
from truth import pipelines

# Token ids, masks and a scheduler's tables (1000 float32 values) are made on the host. In the real run the host is the
# device, and they are seen; in the dry run it is not. Everything larger must be equal.
SMALL_BYTES = 4096


def real(pipe: Any, call: dict[str, Any]) -> Trace:
    """Return the trace of a real run on the CPU under the same follower, with what following changes put right."""
    modules = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    follower = Follower("cpu", [t for m in modules.values() for t in (*m.parameters(), *m.buffers())])
    marks = record.marked(modules, follower), record.steps_marked(pipe, follower)
    parts = record.components(modules)
    with torch.no_grad(), marks[0], marks[1], Target("cpu"), follower:
        pipe(**call)
    return record.trace(pipe, parts, follower)


def dry(pipe: Any, call: dict[str, Any], target: str = "cpu") -> Trace:
    """Return the trace of a dry run: the same pipeline, its weights gone to meta."""
    to_meta(pipe)
    call = {k: twins.give(v.to("meta"), v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    return record.record(pipe, call, target)


def story(trace: Trace) -> list[tuple[str, str, int]]:
    """Return what happened, storages by size and the small ones left out.

    What dies between two other events dies there in no order that memory could show: those are sorted.
    """
    told: list[tuple[str, str, int]] = []
    dead: list[tuple[str, str, int]] = []
    for event in trace.told():
        if event.sign == "-":
            dead += [(event.sign, "", event.size_bytes)] * (event.size_bytes > SMALL_BYTES)
        elif event.sign != "*" and not (event.sign == "+" and event.size_bytes <= SMALL_BYTES):
            told += [*sorted(dead), (event.sign, event.name, event.size_bytes)]
            dead.clear()
    return told + sorted(dead)


def first_difference(left: list[Any], right: list[Any]) -> str:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"at {i}: real {left[i - 3 : i + 4]}, dry {right[i - 3 : i + 4]}"
    return f"lengths {len(left)} and {len(right)}"


def changed(pipe: Any, *names: str) -> Any:
    """Return a pipeline, on meta or not, with optimizers applied that change what is computed."""
    run.change(pipe, [optimizers.spec(n).step() for n in names], "float32")
    return pipe


def to_meta(pipe: Any) -> None:
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to("meta")
            getattr(component, "tie_weights", lambda: None)()  # moving to meta unties


# These copy tables that their models keep on the host. Where the host is the device there is nothing to copy: what they
# hold is compared on the counted device (tests/test_truth.py).
HOST_TABLES = ("qwen_image", "lumina2")


@pytest.mark.parametrize("name", architectures("sd", "sd3", "wan", "flux", without=HOST_TABLES))
def test_a_dry_run_holds_what_a_real_run_holds_event_by_event(name: str) -> None:
    pipe, call = pipelines.made(name)
    truth = story(real(pipe, call))
    told = story(dry(pipe, call))
    assert len(truth) > 500
    assert told == truth, first_difference(truth, told)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((n, "fuse_qkv") for n in ("sd", "sd3", "flux")), ("sd", "attention_slicing")],
)
def test_what_changes_the_computing_changes_a_dry_run_as_it_changes_a_real_one(name: str, optimizer: str) -> None:
    pipe, call = pipelines.made(name)
    truth = story(real(changed(pipelines.made(name)[0], optimizer), call))
    to_meta(pipe)
    told = story(dry(changed(pipe, optimizer), call))
    assert told == truth, first_difference(truth, told)
    assert any(name.endswith(("to_qkv", "to_kv")) for _, name, _ in told) is (optimizer == "fuse_qkv")


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_layouts_of_a_dry_run_are_those_of_a_real_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With filters in channels-last; but that on CUDA, unlike on the CPU, a group norm computes with planar tensors."""
    norm = torch.nn.GroupNorm.forward
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: norm(self, x.contiguous()))
    pipe, call = pipelines.made(name)
    truth = story(real(changed(pipelines.made(name)[0], "channels_last"), call))
    plain = story(dry(pipelines.made(name)[0], call))
    to_meta(pipe)
    told = story(dry(changed(pipe, "channels_last"), call))
    assert told == truth, first_difference(truth, told)
    assert told != plain


def test_fused_weights_are_there_beside_those_they_were_made_of() -> None:
    """FLUX.1-dev: 57 attentions of 3 x 3072 x 3072 weights, in 19 of them the text's as well, each with its bias."""
    model = facts.find("black-forest-labs/FLUX.1-dev")
    request = Request(model=model.id, pipeline_class=model.pipeline_class, height=256, width=256)
    fuse = optimizers.spec("fuse_qkv").step()
    plain, fused = run.trace(model, request, "bfloat16"), run.trace(model, request, "bfloat16", (fuse,))
    more = {w.storage: w for m in fused.component("transformer").modules for w in m.weights if "qkv" in m.path}
    assert sum(w.size_bytes for w in more.values()) == (57 + 19) * 3 * 3072 * (3072 + 1) * 2
    assert not any(w.is_saved for w in more.values())

    def weights(trace: Trace) -> int:
        return sum(w.size_bytes for c in trace.components for w in c.weights())

    assert weights(fused) == weights(plain) + sum(w.size_bytes for w in more.values())
    resident = [stream.peaks(stream.build(t, placements.Resident(t)))[0].peak_bytes for t in (plain, fused)]
    assert resident[1] - resident[0] == pytest.approx(sum(w.size_bytes for w in more.values()), rel=0.001)


def test_a_plan_is_estimated_from_a_dry_run_with_what_changes_the_computing() -> None:
    def plan(*names: str) -> engine.Plan:
        return engine.resolve(optimizers=[{"name": "dtype", "params": {"value": "bfloat16"}}, *names], hardware=here)

    here = machine(card())
    plain, fused, sliced = plan(), plan("fuse_qkv"), plan("attention_slicing")
    more = (fused.estimate.peak_allocated_bytes or 0) - (plain.estimate.peak_allocated_bytes or 0)
    pipe, _ = pipelines.made("flux")
    before = sum(p.numel() for p in pipe.transformer.parameters())
    made = 2 * (sum(p.numel() for p in changed(pipe, "fuse_qkv").transformer.parameters()) - before)
    assert more == pytest.approx(made, rel=0.05)
    # What is in no file is made in host memory, and not read from the disk.
    assert plain.estimate.host.file_bytes == fused.estimate.host.file_bytes
    assert fused.estimate.quality == plain.estimate.quality == "exact"
    # A step that does nothing here changes no estimate, and no other dry run is made for it.
    assert sliced.estimate == plain.estimate


def test_a_trace_is_known_by_the_changes_that_were_made_and_by_nothing_more_without_any() -> None:
    model = facts.find("stable-diffusion-v1-5/stable-diffusion-v1-5")
    request = Request(model=model.id, height=512, width=512)
    spec = optimizers.spec("attention_slicing")
    keys = [store.key(model, request, "float16", c) for c in ((), (spec.step(),), (spec.step({"slices": "max"}),))]
    assert len(set(keys)) == 3
    assert keys[0] == store.key(model, request, "float16")


def test_a_change_that_a_model_does_not_take_is_an_error_of_the_request() -> None:
    pipe, _ = pipelines.made("sd3")
    to_meta(pipe)
    with pytest.raises(IncompatibleError, match="attention_slicing cannot act on StableDiffusion3Pipeline"):
        changed(pipe, "attention_slicing")


def test_a_value_that_is_not_there_is_named() -> None:
    with torch.no_grad(), Follower("meta"):
        large = torch.rand(1000, 1000, device="meta")
        with pytest.raises(twins.ValueNeeded, match="_local_scalar_dense"):
            large.sum().item()


def test_small_values_follow_the_operations() -> None:
    with torch.no_grad(), Follower("meta"):
        steps = torch.linspace(1, 0, 5, device="meta")
        doubled = steps * 2
        doubled[0] = 7.0
        doubled[1:3].add_(1)
        assert doubled.tolist() == pytest.approx([7.0, 2.5, 2.0, 0.5, 0.0])
        assert (doubled == 2.0).nonzero().item() == 2
        assert torch.equal(steps, steps.clone())
        assert steps.to("cpu").sum().item() == pytest.approx(2.5)
        doubled.add_(torch.rand(1000, 1000, device="meta")[0, :5])  # a value from nowhere
        with pytest.raises(twins.ValueNeeded):
            doubled[0].item()


def test_a_value_that_was_written_over_through_a_view_is_gone_from_everything_that_shares_it() -> None:
    with torch.no_grad(), Follower("meta"):
        base = torch.arange(6, device="meta")
        other = base[3:]
        base[1:3].copy_(torch.rand(1000, 1000, device="meta")[0, :2].long())
        for shared in (base, other, base.view(2, 3)):
            with pytest.raises(twins.ValueNeeded):
                shared.sum().item()
        assert torch.arange(6, device="meta").sum().item() == 15


def test_a_picture_without_values_leaves_the_device_as_zeros_that_take_no_memory() -> None:
    with torch.no_grad(), Follower("meta"):
        picture = torch.rand(3, 4096, 4096, device="meta").cpu()
    assert picture.shape == (3, 4096, 4096)
    assert picture.untyped_storage().nbytes() == 4
    assert not picture.any()


def events(follower: Follower) -> list[Event]:
    """Return what a follower saw of storages."""
    seen = Trace(pipeline_class="", components=(), offload_chain=(), offload_excluded=(), **follower.builder.tables())
    return [e for e in seen.told() if e.sign in "+-"]


def test_a_storage_is_born_once_and_dies_once() -> None:
    with torch.no_grad(), Follower("meta") as follower:
        one = torch.empty(1000, device="meta")
        two = one.view(10, 100).transpose(0, 1)[3]
        three = one + 1
        del one
        two.fill_(0)
        del two, three
    assert [(e.sign, e.size_bytes) for e in events(follower)] == [("+", 4000), ("+", 4000), ("-", 4000), ("-", 4000)]


@pytest.fixture(scope="module")
def flux_trace() -> Trace:
    """FLUX.1-dev at 1024 x 1024 in bfloat16, as a card computes it: no weights, no card, some seconds."""
    model = facts.find("black-forest-labs/FLUX.1-dev")
    pipe = build.pipeline(model, torch.bfloat16)
    call = {"prompt": "x", "height": 1024, "width": 1024, "num_inference_steps": 2, "output_type": "np"}
    return record.record(pipe, call, "cuda")


def test_full_size_weights_are_counted_to_the_byte(flux_trace: Trace) -> None:
    """33,741,198,278 bytes is the size of the files on the hub, tied tensors once."""
    weights = [w for c in flux_trace.components for w in c.weights()]
    assert sum(w.size_bytes for w in weights if w.is_saved) == 33_741_198_278


def test_a_full_size_run_peaks_where_it_was_measured_to_without_workspaces(flux_trace: Trace) -> None:
    """Published: 33.851 GiB, of which about 0.92 are the VAE's convolution workspaces and layout copies."""
    peaks = stream.peaks(stream.build(flux_trace, placements.Resident(flux_trace)))
    best = max(peaks, key=lambda p: p.peak_bytes)
    assert best.name == "decode"
    assert best.peak_bytes / GIB == pytest.approx(32.93, abs=0.005)
    assert [p.name for p in peaks] == ["load", "encode", "denoise", "decode"]


def test_offloads_of_a_full_size_model_need_less_and_less(flux_trace: Trace) -> None:
    each = [
        placements.Resident(flux_trace),
        placements.ModelOffload(flux_trace),
        placements.GroupOffload(flux_trace, block_level=True),
        placements.SequentialOffload(flux_trace),
    ]
    sizes = [stream.peak_bytes(stream.peaks(stream.build(flux_trace, p))) for p in each]
    assert sizes == sorted(sizes, reverse=True)
    transformer = sum(w.size_bytes for w in flux_trace.component("transformer").weights())
    assert sizes[1] > transformer  # one component at a time is no less than the largest
    assert sizes[-1] < 3 * GIB


def test_what_is_still_there_when_the_next_encoder_comes_counts() -> None:
    """Published: 12.06 GiB. T5 keeps a part in float32 under float16, and stays while CLIP-G comes a second time."""
    model = facts.find("stabilityai/stable-diffusion-3.5-medium")
    pipe = build.pipeline(model, torch.float16)
    call = {"prompt": "x", "height": 1024, "width": 1024, "num_inference_steps": 1, "output_type": "np"}
    found = record.record(pipe, call, "cuda")
    best = max(stream.peaks(stream.build(found, placements.ModelOffload(found))), key=lambda p: p.peak_bytes)
    assert best.name == "encode"
    assert best.peak_bytes / GIB == pytest.approx(12.06, abs=0.01)


def most_at_once(target: str, function: Any, *inputs: torch.Tensor) -> int:
    """Return the most bytes that a function holds beyond its inputs, computed on meta as a target would."""
    with torch.no_grad(), Target(target), Follower("meta", inputs) as follower:
        kept = function(*inputs)
    live = most = 0
    for event in events(follower):
        live += event.size_bytes if event.sign == "+" else -event.size_bytes
        most = max(most, live)
    del kept
    return most


def test_a_fused_norm_holds_its_output_and_one_taken_apart_holds_six_times_that() -> None:
    """The output alone is 27 MiB; taken apart, float32 copies of it are held as well."""
    x = torch.empty(1, 4608, 3072, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(3072, dtype=torch.bfloat16, device="meta")

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (3072,), weight, 1e-6)

    assert most_at_once("cuda", norm, x, weight) / MIB == pytest.approx(27, abs=0.1)
    assert most_at_once("cpu", norm, x, weight) / MIB == pytest.approx(162, abs=1)
    # A weight of another dtype takes the long way on a card too.
    assert most_at_once("cuda", norm, x, weight.float()) / MIB > 100


@pytest.mark.parametrize(("is_loaded", "copies"), [(True, 1), (False, 0)])
def test_a_bias_is_added_in_place_and_loaded_weights_copy_an_input_that_is_not_contiguous(
    is_loaded: bool, copies: int
) -> None:
    """As torch 2.13 does without a dispatch mode: counted, and read in its `Linear.cpp` and `LinearAlgebra.cpp`."""
    x = torch.empty(2, 100, 64, device="meta")[:, :50]
    layer: Any = torch.nn.Linear(64, 64, device="meta")
    layer = build.as_loaded(layer, torch.float32) if is_loaded else layer.requires_grad_(False)
    for target in ("cuda", "cpu"):
        most = most_at_once(target, torch.nn.functional.linear, x, layer.weight, layer.bias)
        assert most == (1 + copies) * x.numel() * 4


@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolution_of_pictures_that_are_channels_last_leaves_them_so(batch: int) -> None:
    x = torch.empty(batch, 8, 6, 6, device="meta").to(memory_format=torch.channels_last)
    with torch.no_grad(), Follower("meta"):
        made = torch.nn.Conv2d(8, 8, 3, padding=1, device="meta")(x)
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [lambda x: x / 2, lambda x: 3.0 * x, lambda x: x + 1])
def test_numbers_leave_a_picture_laid_out_as_it_was(scale: Any) -> None:
    """A VAE's attention over one picture: the stride of the batch decides whether a convolution sees channels-last.

    Executed (`truth/phantom`): CUDA leaves (8, 1, 48, 8), which is taken as contiguous, so that the input is copied.
    """
    strides = (8, 1, 48, 8)
    x = torch.empty_strided((1, 8, 6, 6), strides, device="meta")
    with torch.no_grad(), Follower("meta"):
        scaled = scale(x)
        made = torch.nn.Conv2d(8, 8, 3, padding=1, device="meta")(scaled)
    assert scaled.stride() == strides == scale(torch.empty_strided((1, 8, 6, 6), strides)).stride()
    assert made.is_contiguous()


def test_a_mask_whose_rows_are_not_whole_eights_is_copied_for_the_memory_efficient_kernel() -> None:
    """T5's bias over 77 tokens in float32: 4 heads x 77 rows of 80, as executed (`truth/phantom`)."""
    query = torch.empty(1, 4, 77, 8, device="meta")
    aligned, ragged = (torch.empty(1, 4, 77, n, device="meta")[..., :77] for n in (80, 77))

    def attend(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    without = most_at_once("cuda", attend, query, aligned)
    assert most_at_once("cuda", attend, query, ragged) - without == 4 * 77 * 80 * 4


@pytest.mark.parametrize(
    ("dtype", "width", "is_masked", "is_fused"),
    [
        (torch.bfloat16, 128, False, True),
        (torch.bfloat16, 36, False, True),
        (torch.float32, 40, False, True),
        (torch.bfloat16, 64, True, True),
        (torch.float32, 6, False, False),
        (torch.float64, 64, False, False),
    ],
)
def test_attention_holds_the_matrix_of_scores_only_where_no_kernel_fits(
    dtype: torch.dtype, width: int, is_masked: bool, is_fused: bool
) -> None:
    length, heads = 2048, 4
    query = torch.empty(1, heads, length, width, dtype=dtype, device="meta")
    mask = torch.empty(1, 1, 1, length, dtype=torch.bool, device="meta") if is_masked else None

    def attend(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    scores = heads * length * length * dtype.itemsize
    assert (most_at_once("cuda", attend, query) < scores / 2) is is_fused


@pytest.mark.parametrize(("dtype", "is_fused"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_flash_kernel_shares_keys_among_heads_and_the_other_does_not(dtype: torch.dtype, is_fused: bool) -> None:
    """Qwen2.5-VL has 28 heads of queries and 4 of keys: executed on the phantom device, nothing is repeated."""
    query, key = (torch.empty(1, heads, 512, 128, dtype=dtype, device="meta") for heads in (28, 4))

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    output = query.numel() * dtype.itemsize
    assert (most_at_once("cuda", attend, query, key) < 1.1 * output) is is_fused


def test_autocast_on_meta_is_entered_where_it_changes_nothing_and_refused_where_it_would() -> None:
    before = torch.autocast
    with record._autocast_knows_meta():
        with torch.autocast("meta", torch.float32), torch.autocast(device_type="meta", enabled=False):
            pass
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled("cpu")
        with pytest.raises(RuntimeError, match="does not follow an autocast"):
            torch.autocast("meta", torch.bfloat16)
    assert torch.autocast is before


def test_a_vae_that_is_widened_for_decoding_is_there_once() -> None:
    """`upcast_vae` puts float32 weights in the place of half ones: those are let go of, and not held beside."""
    pipe, call = pipelines.made("sdxl")
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    found = dry(pipe, call)
    vae = found.component("vae").weights()
    assert set(found.gone) == {w.storage for w in vae if w.dtype == "float16"}
    halves = sum(w.size_bytes for w in vae)
    # It is narrowed again in the end: what is let go of are the halves, and then as many singles.
    made = stream.build(found, placements.Resident(found))
    freed = [-event for event in made.events if event < 0 and made.kinds[-event] == stream.WEIGHT]
    assert [sum(made.sizes[k] for k in freed[: len(vae)]), sum(made.sizes[k] for k in freed)] == [halves, 3 * halves]
    assert {made.owners[k] for k in freed} == {"vae"}
    # Under an offload it is widened on the host, and comes as it is then (executed on the phantom device).
    offloaded = stream.build(found, placements.ModelOffload(found))
    its = [key for key, owner in offloaded.owners.items() if owner == "vae"]
    assert sum(offloaded.sizes[key] for key in its) == 2 * halves + halves  # and what it is narrowed to, on the device
    parts = stream.build(found, placements.SequentialOffload(found))
    largest = max(w.size_bytes for m in found.component("vae").modules for w in m.weights if ".decoder" in m.path)
    assert max(parts.sizes[key] for key, owner in parts.owners.items() if owner == "vae") == 2 * largest
