"""The little world the embedded model is trained on: what can be asked for, how it is said, how it is drawn."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

CANVAS_PX = 128
MARGIN_PX = 4.0
SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.10, 0.25, 0.88),
    "yellow": (0.98, 0.88, 0.12),
    "orange": (0.98, 0.52, 0.08),
    "purple": (0.56, 0.16, 0.74),
    "black": (0.04, 0.04, 0.04),
    "white": (0.97, 0.97, 0.97),
}
POSITIONS: dict[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}

# A figure is measured by one radius; these make the three look equally large.
SQUARE_HALF_SIDE = 0.88
TRIANGLE_CIRCUMRADIUS = 1.28
RADIUS_PX = (15.0, 30.0)
# "left" means a centre in the first 36 % of the canvas, with the other axis near the middle.
NEAR_EDGE_PX = 46.0
MIDDLE_PX = (52.0, 76.0)

HELD_OUT_COUNT = 17


@dataclass(frozen=True, order=True)
class Scene:
    """One picture in words; `position` is None when the prompt does not say where."""

    figure: str
    shape: str
    background: str
    position: str | None = None

    @property
    def triple(self) -> tuple[str, str, str]:
        return (self.figure, self.shape, self.background)


def triples() -> list[tuple[str, str, str]]:
    """Return all 168 (figure colour, shape, background colour), figure and background unlike."""
    return [(f, s, b) for f in COLOURS for s in SHAPES for b in COLOURS if f != b]


def held_out_triples() -> frozenset[tuple[str, str, str]]:
    """Return the 17 of 168 triples (10.1 %) that training never draws, at any position.

    Stepping through colours and shapes at coprime strides spreads them: every colour is held out two or three times
    as a figure, every shape five or six times, and no (figure, shape) pair more than once.
    """
    names = tuple(COLOURS)
    chosen = set()
    for i in range(HELD_OUT_COUNT):
        figure = i % len(names)
        background = (figure + 1 + 3 * i % (len(names) - 1)) % len(names)
        chosen.add((names[figure], SHAPES[i % len(SHAPES)], names[background]))
    return frozenset(chosen)


def held_out_scenes() -> list[Scene]:
    """Return the 85 scenes of the held-out triples: every triple, anywhere and at each position."""
    return [Scene(*t, position=p) for t in sorted(held_out_triples()) for p in (None, *POSITIONS)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def prompt(scene: Scene) -> str:
    """Return the plain sentence for a scene, with the position (if any) at the end after a comma."""
    figure, ground = f"{_article(scene.figure)} {scene.figure}", f"{_article(scene.background)} {scene.background}"
    text = f"{figure} {scene.shape} on {ground} background"
    return text if scene.position is None else f"{text}, {POSITIONS[scene.position]}"


def training_prompt(scene: Scene, rng: random.Random) -> str:
    """Return one of the ways people say a scene; now and then nothing at all, which is what makes guidance work."""
    if rng.random() < 0.06:
        return ""
    bare = rng.random() < 0.08
    figure = f"{scene.figure} {scene.shape}" if bare else f"{_article(scene.figure)} {scene.figure} {scene.shape}"
    ground = "background" if rng.random() < 0.92 else ""
    ground = f"on {'' if bare else _article(scene.background) + ' '}{scene.background} {ground}".rstrip()
    place = "" if scene.position is None else POSITIONS[scene.position]
    if not place:
        text = f"{figure} {ground}"
    elif rng.random() < 0.5:
        text = f"{figure} {place} {ground}"
    else:
        text = f"{figure} {ground}, {place}"
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.05 else "")


def random_scene(rng: random.Random, allowed: list[tuple[str, str, str]]) -> Scene:
    """Return a scene of one of the `allowed` triples; three in ten have no position."""
    position = None if rng.random() < 0.3 else rng.choice(tuple(POSITIONS))
    return Scene(*rng.choice(allowed), position=position)


def _extent(shape: str, radius: float) -> tuple[float, float, float]:
    """Return (half width, reach above the centroid, reach below it) in pixels."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        side = SQUARE_HALF_SIDE * radius
        return side, side, side
    outer = TRIANGLE_CIRCUMRADIUS * radius
    return outer * 3**0.5 / 2, outer, outer / 2


def place(scene: Scene, rng: random.Random) -> tuple[float, float, float]:
    """Return (radius, centre x, centre y) in pixels: a random size and a random place that the scene allows."""
    radius = rng.uniform(*RADIUS_PX)
    half, above, below = _extent(scene.shape, radius)
    x = (MARGIN_PX + half, CANVAS_PX - MARGIN_PX - half)
    y = (MARGIN_PX + above, CANVAS_PX - MARGIN_PX - below)
    if scene.position in ("left", "right"):
        y = MIDDLE_PX
        x = (x[0], NEAR_EDGE_PX) if scene.position == "left" else (CANVAS_PX - NEAR_EDGE_PX, x[1])
    elif scene.position in ("top", "bottom"):
        x = MIDDLE_PX
        y = (y[0], NEAR_EDGE_PX) if scene.position == "top" else (CANVAS_PX - NEAR_EDGE_PX, y[1])
    return radius, rng.uniform(*x), rng.uniform(*y)


def _distance(shape: str, radius: float, dx: Tensor, dy: Tensor) -> Tensor:
    """Return the signed distance in pixels to the figure's outline, negative inside (a bound outside the corners)."""
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF_SIDE * radius
    inner = TRIANGLE_CIRCUMRADIUS * radius / 2
    slope = 3**0.5 / 2 * dx.abs() - dy / 2
    return torch.maximum(slope, dy) - inner


def draw(scene: Scene, radius: float, x: float, y: float) -> Tensor:
    """Return the picture as float32 [3, 128, 128] in [-1, 1], edges anti-aliased over one pixel."""
    axis = torch.arange(CANVAS_PX, dtype=torch.float32) + 0.5
    dy, dx = torch.meshgrid(axis - y, axis - x, indexing="ij")
    cover = (0.5 - _distance(scene.shape, radius, dx, dy)).clamp(0, 1)
    figure = torch.tensor(COLOURS[scene.figure]).view(3, 1, 1)
    ground = torch.tensor(COLOURS[scene.background]).view(3, 1, 1)
    return (ground + (figure - ground) * cover) * 2 - 1


def draw_batch(count: int, rng: random.Random, allowed: list[tuple[str, str, str]]) -> tuple[Tensor, list[Scene]]:
    """Return `count` random pictures, float32 [count, 3, 128, 128], with their scenes."""
    scenes = [random_scene(rng, allowed) for _ in range(count)]
    return torch.stack([draw(s, *place(s, rng)) for s in scenes]), scenes
