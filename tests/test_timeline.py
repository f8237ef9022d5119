"""The memory timeline: what is drawn is what is replayed, texts have room, and a file is there whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine import chart
from engine.estimate import stream, timeline, whole
from engine.estimate.stream import ACTIVATION, WEIGHT, WORKSPACE, Stream
from engine.estimate.timeline import MAX_POINTS, Timeline
from engine.estimate.trace import Trace, Work
from engine.optimizers import spec
from engine.plan import Plan
from engine.svg import text_width
from engine.values import Device, Estimate, FrozenDict
from tests.conftest import card, machine
from tests.test_cli import refused, run
from tests.test_replay import component, module, trace

GIB, MIB = 1024**3, 1024**2
SVG = "{http://www.w3.org/2000/svg}"
PLACEMENTS = ("resident", "model_offload", "sequential_offload", "group_offload")


def toy() -> Trace:
    """Return a run of three components, of GiB, two denoising steps marked in it."""
    text = component("text_encoder", module("text_encoder.a", 4 * GIB, 3 * GIB))
    net = component(
        "transformer", module("transformer.a", 10 * GIB), module("transformer.b", 7 * GIB, buffers=(900 * MIB,))
    )
    vae = component("vae", module("vae.a", 300 * MIB))
    step = [
        *("transformer", "transformer.a", str(500 * MIB), "/transformer.a"),
        *("transformer.b", str(70 * MIB), f"-{500 * MIB}", "/transformer.b", f"-{70 * MIB}", "/transformer"),
    ]
    made = trace(
        [text, net, vae],
        *("=encode", "text_encoder", "text_encoder.a", str(90 * MIB), "/text_encoder.a", "/text_encoder"),
        *("=denoise", *step, *step),
        *("=decode", "vae", "vae.a", str(2 * GIB), "/vae.a", "/vae", f"-{2 * GIB}", f"-{90 * MIB}"),
    )
    ends = [i for i, e in enumerate(made.told()) if e == ("<", "transformer", 0, 0)]
    events = made.events[:]
    for i in reversed(ends):
        events.insert(i + 1, 6)  # STEP
    events.insert(len(events) - 4, 5)  # a convolution in the VAE
    conv = Work("conv", "bfloat16", (1, 128, 128, 1, 0, 1024, 1024, 3, 3, 1, 1, 1, 1, 1024, 1024), 1)
    return dataclasses.replace(made, events=events, works=(conv,))


def planned(name: str, **estimated: Any) -> tuple[Plan, Timeline]:
    """Return a plan and the timeline of the toy under a placement."""
    gpu = card(23.0, name="RTX 4090")
    steps = (dataclasses.replace(spec("dtype").step(), params=FrozenDict(value="bfloat16")), spec(name).step())
    taken = whole.estimate(toy(), steps, gpu, dtype="bfloat16", denoising_steps=28, stored={})
    plan = dataclasses.replace(
        engine.resolve(device="cpu", steps=28),
        hardware=machine(gpu),
        device=Device(uuid=gpu.uuid, index=gpu.index),
        optimizers=steps,
        estimate=dataclasses.replace(taken, **estimated),
        budget_bytes=int(22.5 * GIB),
    )
    return plan, timeline.of_trace(toy(), steps, gpu, "bfloat16")


# The series


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Return a stream of phases, long and short, of allocations of every kind."""
    made = Stream()
    dice = draw(st.randoms(use_true_random=False))
    alive: list[int] = []
    for phase in range(draw(st.integers(1, 6))):
        made.marks.append((len(made.events), f"phase.{phase}"))
        for _ in range(draw(st.sampled_from([0, 1, 7, 100, 3000]))):
            if alive and dice.random() < 0.5:
                made.events.append(-alive.pop(dice.randrange(len(alive))))
            elif dice.random() < 0.05:
                made.events.append(0)
            else:
                kind = dice.choice([WEIGHT, ACTIVATION, WORKSPACE])
                owner = dice.choice(["a", "b"]) if kind == WEIGHT else None
                alive.append(made.allocate(dice.randrange(10**9), kind, owner))
    return made


@settings(max_examples=40, deadline=None)
@given(streams())
def test_a_series_is_short_and_keeps_every_peak(made: Stream) -> None:
    series = timeline.of_stream(made, {"a": 1, "b": 1})
    peaks = stream.peaks(made)
    assert sum(len(p.points) for p in series.phases) <= MAX_POINTS
    for phase, peak in zip(series.phases, peaks, strict=True):
        most = phase.peak_point
        assert (phase.name, most.total_bytes) == (peak.name, peak.peak_bytes)
        assert (most.weights_bytes, most.activation_bytes) == (peak.weights_bytes, peak.activation_bytes)
        assert most.workspace_bytes == peak.workspace_bytes
        assert [p.position for p in phase.points] == sorted({p.position for p in phase.points})
    for before, after in zip(series.phases, series.phases[1:], strict=False):
        assert dataclasses.replace(before.points[-1], position=0) == dataclasses.replace(after.points[0], position=0)


@settings(max_examples=40, deadline=None)
@given(streams())
def test_a_series_keeps_the_range_of_the_weights(made: Stream) -> None:
    only_weights = Stream([k if made.kinds[abs(k)] == WEIGHT else 0 for k in made.events], made.sizes, made.kinds)
    only_weights.marks = made.marks
    series = timeline.of_stream(made, {"a": 1, "b": 1})
    for phase, peak in zip(series.phases, stream.peaks(only_weights), strict=True):
        assert max(p.weights_bytes for p in phase.points) == peak.peak_bytes


def test_a_step_of_the_weights_is_found_in_a_long_phase() -> None:
    """Something comes, stays for a fiftieth of a phase, and goes, among activations that are larger."""
    made = Stream(marks=[(0, "denoise")])
    for turn in range(5000):
        if turn == 3000:
            key = made.allocate(10 * MIB, WEIGHT, "a")
        elif turn == 3100:
            made.events.append(-key)
        made.events.append(-made.allocate(100 * MIB, ACTIVATION))
    (phase,) = timeline.of_stream(made, {"a": 10 * MIB}).phases
    there = [p.position for p in phase.points if p.weights_bytes]
    assert 0.59 < min(there) < 0.61 and 0.61 < max(there) < 0.63


def test_very_many_phases_keep_their_exact_moments() -> None:
    made = Stream()
    for phase in range(300):
        made.marks.append((len(made.events), f"p{phase}"))
        made.events.append(-made.allocate(MIB * phase, ACTIVATION))
    series = timeline.of_stream(made, {})
    assert [p.peak_point.total_bytes for p in series.phases] == [MIB * p for p in range(300)]


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_trace_becomes_its_timeline(name: str) -> None:
    plan, series = planned(name)
    assert series.components == ("text_encoder", "transformer", "vae")
    assert series.sizes_bytes == (7 * GIB, 17 * GIB + 900 * MIB, 300 * MIB)
    told = [(p.name, p.weights_bytes, p.activation_bytes, p.workspace_bytes) for p in plan.estimate.phases]
    found = [(p.name, p.peak_point) for p in series.phases]
    assert [(n, p.weights_bytes, p.activation_bytes, p.workspace_bytes) for n, p in found] == told
    assert [len(p.step_ends) for p in series.phases] == [0, 0, 2, 0]


def test_under_model_offload_each_component_has_its_time() -> None:
    _, series = planned("model_offload")
    there = {
        p.name: [tuple(bool(b) for b in q.components_bytes) for q in p.points if q.weights_bytes] for p in series.phases
    }
    assert there["encode"][-1] == (True, False, False)
    assert there["denoise"][-1] == (False, True, False)
    assert there["decode"][0] == (False, True, False)  # it stays until its successor comes
    assert there["decode"][-1] == (False, False, True)


# The drawing


def texts(drawn: str) -> list[tuple[str, float, float, float, float]]:
    """Return each text with its box: left, top, right, bottom, as wide as it is at most."""
    found = []
    for e in ET.fromstring(drawn.encode()).iter(f"{SVG}text"):
        size = float(e.attrib["font-size"])
        width = text_width(e.text or "", size, is_bold=e.get("font-weight") == "bold")
        left = float(e.attrib["x"]) - {"start": 0.0, "middle": width / 2, "end": width}[e.get("text-anchor", "start")]
        y = float(e.attrib["y"])
        found.append((e.text or "", left, y - 0.75 * size, left + width, y + 0.2 * size))
    return found


def check_texts(drawn: str) -> None:
    """Hold that no text covers another, and that none is cut."""
    root = ET.fromstring(drawn.encode())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    placed = texts(drawn)
    for i, (text, left, top, right, bottom) in enumerate(placed):
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, f"{text!r} is cut"
        for other, o_left, o_top, o_right, o_bottom in placed[i + 1 :]:
            apart = right <= o_left or o_right <= left or bottom <= o_top or o_bottom <= top
            assert apart, f"{text!r} covers {other!r}"


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_drawing_has_room_for_its_texts(name: str) -> None:
    plan, series = planned(name)
    drawn = chart.svg(plan, series)
    check_texts(drawn)
    said = [t[0] for t in texts(drawn)]
    assert {"load", "encode", "denoise", "decode", "step 1"} <= set(said)
    assert any(t.startswith("budget 22.50 GiB") for t in said)
    assert any(t.startswith("peak in ") for t in said)
    assert drawn == chart.svg(*planned(name))  # the same again


def test_under_model_offload_components_are_named_in_their_weights() -> None:
    said = [t[0] for t in texts(chart.svg(*planned("model_offload")))]
    assert said.count("transformer") == 1
    assert [t for t in said if t.startswith(("step 2", "2 …"))]
    assert "first 2 of 28 denoising steps are drawn" in " ".join(said)


def test_a_drawing_is_told_to_those_who_do_not_see_it() -> None:
    root = ET.fromstring(chart.svg(*planned("model_offload")).encode())
    assert root.attrib["role"] == "img"
    title, told = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None and told is not None and told.text is not None
    assert root.attrib["aria-labelledby"] == f"{title.attrib['id']} {told.attrib['id']}"
    assert "The peak is 18.52 GiB" in told.text and "in denoise" in told.text


def test_a_drawing_without_seconds_and_with_a_far_budget() -> None:
    plan, series = planned("model_offload", seconds=None, load_seconds=None)
    phases = tuple(dataclasses.replace(p, seconds=None) for p in plan.estimate.phases)
    estimate = dataclasses.replace(plan.estimate, phases=phases)
    drawn = chart.svg(dataclasses.replace(plan, estimate=estimate, budget_bytes=80 * GIB), series)
    check_texts(drawn)
    assert "phases are equally wide" in drawn and "(above the drawing)" in drawn


def test_names_that_are_hostile_to_xml_are_escaped() -> None:
    plan, series = planned("resident")
    request = dataclasses.replace(plan.request, model="</svg><script>&\x00\ud800 ]]>" * 20)
    drawn = chart.svg(dataclasses.replace(plan, request=request), series)
    check_texts(drawn)
    assert not list(ET.fromstring(drawn.encode()).iter(f"{SVG}script"))


def test_many_phases_make_a_wider_drawing() -> None:
    plan, series = planned("resident")
    many = dataclasses.replace(series, phases=series.phases * 8)
    check_texts(chart.svg(plan, many))


def test_nothing_on_the_card_is_drawn_too() -> None:
    plan, _ = planned("resident")
    empty = timeline.of_stream(Stream(marks=[(0, "load")]), {})
    check_texts(chart.svg(dataclasses.replace(plan, estimate=Estimate(), budget_bytes=None), empty))


# The command

EMBEDDED = ["plan", "--exact", "--gpu", "RTX 4090", "--torch_dtype", "bfloat16"]


@pytest.mark.usefixtures("no_card")
def test_a_timeline_is_written_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "timeline.svg"
    code, plain, _ = run(capsys, *EMBEDDED)
    assert code == 0
    path.write_text("what was there", encoding="utf-8")
    code, out, err = run(
        capsys, *EMBEDDED, "--timeline", str(path)
    )  # the answers are known now; the trace is found again
    assert (code, out) == (0, plain)
    assert f"the timeline is in {path}" in err
    check_texts(path.read_text(encoding="utf-8"))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("no_card")
def test_a_disk_that_is_full_leaves_what_was_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "timeline.svg"
    path.write_text("what was there", encoding="utf-8")
    run(capsys, *EMBEDDED)
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run(capsys, *EMBEDDED, "--timeline", str(path))
    assert code == 8
    assert "No space left on device" in err
    assert path.read_text(encoding="utf-8") == "what was there"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("no_card")
def test_bad_places_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "resolve", None)
    assert "a timeline is drawn as SVG" in refused(capsys, 2, *EMBEDDED, "--timeline", str(tmp_path / "a.png"))
    assert "ends in nothing" in refused(capsys, 2, *EMBEDDED, "--timeline", str(tmp_path / "a"))
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    assert "is a directory" in refused(capsys, 8, *EMBEDDED, "--timeline", str(folder))
    assert "does not exist" in refused(capsys, 8, *EMBEDDED, "--timeline", str(tmp_path / "no" / "a.svg"))
    (tmp_path / "file").touch()
    assert "no directory" in refused(capsys, 8, *EMBEDDED, "--timeline", str(tmp_path / "file" / "a.svg"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "permission denied" in refused(capsys, 8, *EMBEDDED, "--timeline", str(tmp_path / "a.svg"))


@pytest.mark.usefixtures("no_card")
def test_without_an_estimate_there_is_no_timeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    code, out, err = run(capsys, "plan", "--device", "cpu", "--timeline", str(path))
    assert code == 6
    assert "embedded" in out
    assert "there is no timeline" in err and "runs without" in err
    code, _, err = run(
        capsys, "plan", "--gpu", "RTX 4090", "--vram", "600MiB", "--headroom", "500MiB", "--timeline", str(path)
    )
    assert code == 4
    assert "nothing fits" in err
    assert not path.exists()
