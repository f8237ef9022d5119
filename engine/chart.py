"""The memory timeline of a plan as an SVG chart: what is on the card, phase by phase, and what there is room for.

From the top: what is run; the phases; the card's memory, stacked; how much of each component's weights is on the card.
Every text's place is worked out from its width, so that none covers another and none is cut.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine import explain
from engine.estimate.stream import LOADING
from engine.estimate.timeline import PhaseLine, Point, Timeline
from engine.plan import Plan
from engine.svg import Drawing, text_width
from engine.units import GIB, format_seconds, format_size

# Told apart by lightness as well as by colour: for print, and for eyes that see fewer colours.
_WEIGHTS = ("#08519c", "#6baed6", "#2171b5", "#7fb8da", "#08306b", "#5a9fd0")
_ACTIVATIONS, _WORKSPACES, _CONTEXT = "#fdcb4d", "#a63a0a", "#d0d0d0"
_INK, _FAINT, _GRID = "#222222", "#666666", "#dddddd"

_WIDTH = 1100.0
_EDGE = 16.0
_RIGHT = 158.0
_PLOT = 340.0
_ABOVE = 44.0
"""Between the highest of what is drawn and the plot's top: room for the peak's label."""
_ROW, _ROW_GAP = 15.0, 7.0
_SMALL, _USUAL, _LARGE = 11.0, 12.0, 15.0
_NAME = 15.0
"""The least height that a component's name is written into."""
_PHASE = 120.0
"""The least width of a phase, but for loading."""
_FARTHEST = 1.6
"""A budget that is more than this many times what is drawn would press the drawing flat; it is only named then."""
_LEAST_SHARE = 1e-4
"""Below this a component's weights are not there, for the eye: a few buffers."""


@dataclass(frozen=True, slots=True)
class _Column:
    """What is drawn from `x` on."""

    x: float
    point: Point


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things are: phases from `edges[i]` to `edges[i + 1]`, bytes from `base` upward."""

    edges: tuple[float, ...]
    plot_top: float
    base: float
    top_bytes: float
    width: float

    def x(self, phase: int, position: float) -> float:
        left, right = self.edges[phase], self.edges[phase + 1]
        return left + (right - left) * position

    def y(self, size_bytes: float) -> float:
        return self.base - (self.base - self.plot_top - _ABOVE) * size_bytes / self.top_bytes


def svg(plan: Plan, timeline: Timeline) -> str:
    """Return the drawing of a plan's timeline."""
    drawing = Drawing()
    rows = [f"{n}  {format_size(s)}" for n, s in zip(timeline.components, timeline.sizes_bytes, strict=True)]
    left = _EDGE + max((text_width(r, _SMALL) for r in [*rows, "weights on the card"]), default=0) + 8
    edges = _edges(plan, timeline, left)
    width = max(_WIDTH, edges[-1] + _RIGHT)
    y = _heading(drawing, plan, width)
    y = _legend(drawing, timeline, y + 14)
    plot_top = y + 46
    layout = _Layout(edges, plot_top, plot_top + _PLOT, _top_bytes(plan, timeline), width)
    columns = list(_columns(timeline, layout))
    rows_top = layout.base + 26
    bottom = rows_top + len(rows) * (_ROW + _ROW_GAP)

    _axis(drawing, layout)
    _stack(drawing, timeline, layout, columns)
    _phases(drawing, plan, timeline, layout, bottom)
    _steps(drawing, plan, timeline, layout)
    lines = _limits(drawing, plan, layout)
    _names(drawing, timeline, layout, columns, lines)
    _peak(drawing, plan, timeline, layout, lines)
    drawing.text(left - 8, layout.base + 17, "weights on the card", size=_SMALL, anchor="end", fill=_FAINT)
    for row, label in enumerate(rows):
        _presence(drawing, timeline, layout, columns, row, label, rows_top + row * (_ROW + _ROW_GAP))
    for line in _wrapped(_note(plan, timeline), _SMALL, width - 2 * _EDGE):
        bottom += 16
        drawing.text(_EDGE, bottom, line, size=_SMALL, fill=_FAINT)
    return drawing.to_text(width, bottom + 12, f"Memory timeline: {plan.request.model}", _told(plan, timeline))


def _seconds(plan: Plan, phase: int, name: str) -> float | None:
    taken = plan.estimate
    if name == LOADING:
        return taken.load_seconds
    return taken.phases[phase].seconds if phase < len(taken.phases) else None


def _phase_labels(plan: Plan, timeline: Timeline) -> list[tuple[str, str]]:
    found = []
    for i, phase in enumerate(timeline.phases):
        seconds = _seconds(plan, i, phase.name)
        told = "" if seconds is None else "< 0.01 s" if seconds < 0.01 else format_seconds(seconds)
        found.append((phase.name, told))
    return found


def _edges(plan: Plan, timeline: Timeline, left: float) -> tuple[float, ...]:
    """Return where phases begin, and where the last ends: each has room for its label, and the rest goes by time."""
    labels = _phase_labels(plan, timeline)
    least = [
        max(text_width(n, _USUAL, is_bold=True) + 14, text_width(s, _SMALL) + 14, 0.0 if n == LOADING else _PHASE)
        for n, s in labels
    ]
    known = [_seconds(plan, i, p.name) for i, p in enumerate(timeline.phases)]
    is_timed = all(s is not None for s, p in zip(known, timeline.phases, strict=True) if p.name != LOADING)
    shares = [
        0.0 if p.name == LOADING else math.sqrt(s or 0.0) if is_timed else 1.0
        for s, p in zip(known, timeline.phases, strict=True)
    ]
    if not any(shares):
        shares = [1.0] * len(shares)
    rest = max(0.0, _WIDTH - _RIGHT - left - sum(least))
    widths = [w + rest * s / sum(shares) for w, s in zip(least, shares, strict=True)]
    return tuple(float(round(e)) for e in itertools.accumulate(widths, initial=left))


def _top_bytes(plan: Plan, timeline: Timeline) -> float:
    most = max(p.peak_point.total_bytes for p in timeline.phases) + timeline.context_bytes
    most = max(most, plan.estimate.required_bytes or 0, 1)
    budget = plan.budget_bytes
    return max(most, budget) if budget is not None and budget <= _FARTHEST * most else most


def _columns(timeline: Timeline, layout: _Layout) -> Iterator[_Column]:
    """Yield what each pixel column shows: the most there is within it, so that a short peak is seen."""
    placed = [(round(layout.x(i, p.position)), p) for i, phase in enumerate(timeline.phases) for p in phase.points]
    groups = [(x, [p for _, p in g]) for x, g in itertools.groupby(placed, key=lambda c: c[0])]
    for i, (x, points) in enumerate(groups):
        yield _Column(x, max(points, key=lambda p: p.total_bytes))
        if i + 1 == len(groups) or groups[i + 1][0] > x + 1:
            yield _Column(x + 1, points[-1])


def _wrapped(text: str, size: float, width: float, *, is_bold: bool = False) -> list[str]:
    return textwrap.wrap(text, max(10, int(width / text_width("x", size, is_bold=is_bold))))


def _heading(drawing: Drawing, plan: Plan, width: float) -> float:
    """Write what is run, on what. Returns the last baseline."""
    card = plan.card
    where = "" if card is None else f" on {card.name}{' (hypothetical)' if card.hypothetical else ''}"
    lines = [
        (f"{plan.request.model}, {explain.picture(plan)}", _LARGE, True),
        (", ".join(map(str, plan.optimizers)) + where, _USUAL, False),
    ]
    y = _EDGE - 2.0
    for text, size, is_bold in lines:
        for line in _wrapped(text, size, width - 2 * _EDGE, is_bold=is_bold):
            y += size + 5
            drawing.text(_EDGE, y, line, size=size, is_bold=is_bold, fill=_INK)
    return y


def _legend(drawing: Drawing, timeline: Timeline, y: float) -> float:
    """Show which colour is what, from the bottom of the stack up. Returns the lower edge."""
    x = _EDGE
    shades = _WEIGHTS[: max(1, min(4, len(timeline.components)))]
    for label, colours in (
        ("CUDA context", (_CONTEXT,)),
        ("weights, a shade for each component", shades),
        ("activations", (_ACTIVATIONS,)),
        ("workspaces of operators", (_WORKSPACES,)),
    ):
        for colour in colours:
            drawing.rect(x, y, 12, 12, colour)
            x += 12
        drawing.text(x + 6, y + 10, label, size=_SMALL, fill=_INK)
        x += 6 + text_width(label, _SMALL) + 14
    return y + 12


def _axis(drawing: Drawing, layout: _Layout) -> None:
    """Draw the ticks: GiB, at round numbers."""
    steps = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5)]
    step = next(s for s in steps if layout.top_bytes / GIB / s <= 8)
    left, right = layout.edges[0], layout.edges[-1]
    tick = 0
    while layout.y(tick * step * GIB) >= layout.plot_top + 6:
        y = layout.y(tick * step * GIB)
        drawing.line(left - 4, y, right, y, _GRID)
        drawing.text(left - 8, y + 4, f"{tick * step:g} GiB", size=_SMALL, anchor="end", fill=_INK)
        tick += 1


def _shade(component: int) -> str:
    return _WEIGHTS[component % len(_WEIGHTS)]


def _stack(drawing: Drawing, timeline: Timeline, layout: _Layout, columns: Sequence[_Column]) -> None:
    """Fill the stack from its highest layer to its lowest, each down to the ground."""
    count = len(timeline.components)
    layers = [(k, colour) for k, colour in enumerate([_CONTEXT, *map(_shade, range(count)), _ACTIVATIONS, _WORKSPACES])]
    heights = [_heights(c.point, timeline.context_bytes) for c in columns]
    for k, colour in reversed(layers):
        corners = [(c.x, round(layout.y(h[k]))) for c, h in zip(columns, heights, strict=True)]
        drawing.area(corners, layout.base, layout.edges[-1], colour)


def _heights(point: Point, context_bytes: int) -> list[int]:
    """Return up to how many bytes each layer reaches: context, components, activations, workspaces."""
    parts = (context_bytes, *point.components_bytes, point.activation_bytes, point.workspace_bytes)
    return list(itertools.accumulate(parts))


def _phases(drawing: Drawing, plan: Plan, timeline: Timeline, layout: _Layout, bottom: float) -> None:
    """Write the phases' names and seconds over the plot, and part them."""
    for i, (name, seconds) in enumerate(_phase_labels(plan, timeline)):
        left, right = layout.edges[i], layout.edges[i + 1]
        drawing.line(left, layout.plot_top - 34, left, bottom, _FAINT)
        middle = (left + right) / 2
        drawing.text(middle, layout.plot_top - 21, name, anchor="middle", is_bold=True, fill=_INK)
        if seconds:
            drawing.text(middle, layout.plot_top - 6, seconds, size=_SMALL, anchor="middle", fill=_INK)
    drawing.line(layout.edges[-1], layout.plot_top - 34, layout.edges[-1], bottom, _FAINT)
    drawing.line(layout.edges[0], layout.base, layout.edges[-1], layout.base, _INK)


def _steps(drawing: Drawing, plan: Plan, timeline: Timeline, layout: _Layout) -> None:
    """Mark the denoising steps that were traced, and say that the others are like the last of them."""
    traced = sum(len(p.step_ends) for p in timeline.phases)
    number = 0
    for i, phase in enumerate(timeline.phases):
        left = layout.edges[i]
        for position in phase.step_ends:
            number += 1
            right = layout.x(i, position)
            if right < layout.edges[i + 1] - 3:
                drawing.line(right, layout.plot_top, right, layout.base + 8, _FAINT, 0.7, "1 3")
            for text in _step_texts(number, traced, plan.request.steps):
                if text_width(text, _SMALL) + 6 <= right - left:
                    drawing.text((left + right) / 2, layout.base + 15, text, size=_SMALL, anchor="middle", fill=_INK)
                    break
            left = right


def _step_texts(number: int, traced: int, steps: int | None) -> list[str]:
    """Return what to call a step, the longest first."""
    if number < traced or (steps is not None and steps <= traced):
        return [f"step {number}", str(number)]
    rest = "the later ones" if steps is None else f"{steps - traced} more"
    short = "later ones" if steps is None else str(steps - traced)
    return [
        f"step {number}, and {rest} alike",
        f"step {number}, {short} alike",
        f"step {number} … alike",
        f"step {number} …",
        f"{number} …",
    ]


def _limits(drawing: Drawing, plan: Plan, layout: _Layout) -> list[float]:
    """Draw the budget and what is needed, named at the right. Returns the heights of the lines."""
    found: list[tuple[float, str, str]] = []
    budget, needed = plan.budget_bytes, plan.estimate.required_bytes
    if needed is not None:
        found.append((layout.y(needed), f"needed {format_size(needed)}", "2 3"))
    if budget is not None and budget <= layout.top_bytes:
        found.append((layout.y(budget), f"budget {format_size(budget)}", "9 4"))
    elif budget is not None:
        text = f"budget {format_size(budget)}"
        x, y = layout.edges[-1] + 22, layout.plot_top + 2
        drawing.text(x, y, text, size=_SMALL, fill=_INK)
        drawing.text(x, y + 13, "(above the drawing)", size=_SMALL, fill=_FAINT)
    right = layout.edges[-1]
    free = layout.base + 4
    for y, label, dash in sorted(found, reverse=True):
        drawing.line(layout.edges[0], y, right, y, _INK, 1.4, dash)
        at = min(y + 4, free)
        free = at - 15
        drawing.line(right, y, right + 18, at - 4, _INK, 0.8)
        drawing.text(right + 22, at, label, size=_SMALL, is_bold=True, fill=_INK)
    return [y for y, _, _ in found]


def _names(
    drawing: Drawing, timeline: Timeline, layout: _Layout, columns: Sequence[_Column], lines: Sequence[float]
) -> None:
    """Write each component's name into its weights, where they are wide and high enough."""
    stacks = [_heights(c.point, timeline.context_bytes) for c in columns]
    for k, name in enumerate(timeline.components):
        bands = [(c.x, round(layout.y(s[k + 1])), round(layout.y(s[k]))) for c, s in zip(columns, stacks, strict=True)]
        found = _largest(bands, layout.edges[-1], text_width(name, _SMALL) + 8)
        if found is None:
            continue
        left, right, top, bottom = found
        middle = (top + bottom) / 2
        nearest = min((y for y in lines), key=lambda y: abs(y - middle), default=middle + 99)
        if abs(nearest - middle) < 10:  # beside the line, on the side that has more room
            middle = nearest + (14 if bottom - nearest > nearest - top else -14)
        if top + 7 <= middle <= bottom - 7:
            fill = "#ffffff" if k % 2 == 0 else "#000000"
            drawing.text((left + right) / 2, middle + 4, name, size=_SMALL, anchor="middle", fill=fill)


def _largest(
    bands: Sequence[tuple[float, float, float]], right: float, width: float
) -> tuple[float, float, float, float] | None:
    """Return the largest rectangle (left, right, top, bottom) within bands (left, top, bottom), or None.

    It is as wide as asked for at least, and as high as a name.
    """
    runs = [next(g) for _, g in itertools.groupby(bands, key=lambda b: b[1:])]
    ends = [r[0] for r in runs[1:]] + [right]
    best: tuple[float, float, float, float] | None = None
    area = 0.0
    for i, (left, top, bottom) in enumerate(runs):
        for (_, upper, lower), end in zip(runs[i:], ends[i:], strict=True):
            top, bottom = max(top, upper), min(bottom, lower)
            if bottom - top < _NAME:
                break
            if end - left >= width and (end - left) * (bottom - top) > area:
                best, area = (left, end, top, bottom), (end - left) * (bottom - top)
    return best


def _peak_told(plan: Plan, timeline: Timeline) -> tuple[PhaseLine, str]:
    """Return the phase with the peak, and the peak's size as the plan tells it."""
    at = timeline.peak_phase
    phase = timeline.phases[at]
    told = plan.estimate.phases[at].peak_bytes if at < len(plan.estimate.phases) else None
    return phase, format_size(told or phase.peak_point.total_bytes)


def _peak(drawing: Drawing, plan: Plan, timeline: Timeline, layout: _Layout, lines: Sequence[float]) -> None:
    """Mark the peak, and say over it how much it is: over the lines too, where these are near."""
    phase, size = _peak_told(plan, timeline)
    x = layout.x(timeline.peak_phase, phase.peak_point.position)
    y = layout.y(phase.peak_point.total_bytes + timeline.context_bytes)
    text = f"peak in {phase.name}: {size} in tensors"
    half = text_width(text, _USUAL, is_bold=True) / 2 + 4
    middle = min(max(x, layout.edges[0] + half), layout.edges[-1] - half)
    baseline = y - 10
    for line in sorted(lines, reverse=True):
        if baseline - 12 <= line <= baseline + 5:
            baseline = line - 7
    drawing.line(x, y, x, baseline + 3, _INK, 0.8)
    drawing.circle(x, y, 4, _INK, "#ffffff")
    drawing.text(middle, baseline, text, anchor="middle", is_bold=True, fill=_INK, has_halo=True)


def _presence(
    drawing: Drawing,
    timeline: Timeline,
    layout: _Layout,
    columns: Sequence[_Column],
    row: int,
    label: str,
    top: float,
) -> None:
    """Draw how much of a component's weights is on the card: the full height is all of them."""
    drawing.text(layout.edges[0] - 8, top + 12, label, size=_SMALL, anchor="end", fill=_INK)
    base = top + _ROW
    drawing.line(layout.edges[0], base, layout.edges[-1], base, _GRID)
    corners = []
    for column in columns:
        share = min(1.0, column.point.components_bytes[row] / timeline.sizes_bytes[row])
        corners.append((column.x, base - (max(1.5, share * _ROW) if share >= _LEAST_SHARE else 0.0)))
    drawing.area(corners, base, layout.edges[-1], _shade(row))


def _note(plan: Plan, timeline: Timeline) -> str:
    """Return what the widths mean, and the lines."""
    timed = plan.estimate.seconds is not None
    widths = (
        "A phase's width grows with the square root of its seconds (loading is not to scale)"
        if timed
        else "The seconds are not known: phases are equally wide"
    )
    traced, steps = sum(len(p.step_ends) for p in timeline.phases), plan.request.steps
    drawn = f" The first {traced} of {steps} denoising steps are drawn." if steps and 0 < traced < steps else ""
    return (
        f"{widths}; within it, allocations are in their order. Needed is what the run cannot do without:"
        " gaps between tensors are counted, workspaces that can be given up are not." + drawn
    )


def _told(plan: Plan, timeline: Timeline) -> str:
    """Return the drawing in words."""
    phase, size = _peak_told(plan, timeline)
    parts = [f"The card's memory over the run. The peak is {size} in tensors, in {phase.name}."]
    for phase, (name, seconds) in zip(timeline.phases, _phase_labels(plan, timeline), strict=True):
        most = phase.peak_point
        there = [
            f"{n} {format_size(b)}"
            for n, b in zip(timeline.components, most.components_bytes, strict=True)
            if b >= GIB // 1000
        ]
        of_these = f" ({', '.join(there)})" if there else ""
        parts.append(
            f"{name}{f' ({seconds})' if seconds else ''}: at most {format_size(most.total_bytes)},"
            f" weights {format_size(most.weights_bytes)}{of_these},"
            f" activations {format_size(most.activation_bytes)}, workspaces {format_size(most.workspace_bytes)}."
        )
    if plan.estimate.required_bytes is not None:
        parts.append(f"Needed on the card: {format_size(plan.estimate.required_bytes)}.")
    if plan.budget_bytes is not None:
        parts.append(f"Budget: {format_size(plan.budget_bytes)}.")
    return " ".join(parts)
