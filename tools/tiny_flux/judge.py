"""Read a generated picture back: which figure, of which colour, on what, and where. Plain geometry, no learning.

The measure, in full (pictures are [128, 128, 3], colours in [-1, 1]):

- background: the median colour of the 3-pixel frame, named by the nearest of the eight colours;
- on a background that has no name nothing else is judged: what differs from mud or noise is no figure;
- mask: pixels farther than 0.5 from that median, opened by a 3 x 3 square so that specks do not count;
- figure colour: the median colour of the mask eroded by 2 pixels, named by the nearest of the eight;
- a colour counts only within 0.45 of its name, so that mud is nobody's colour;
- shape: three templates (full rectangle, ellipse, upward triangle) are stretched to the mask's bounding box, and the
  one with the greatest intersection over union wins if it reaches 0.7;
- position: the mask's centroid, as a share of the side, below 0.45 (left, top) or above 0.55 (right, bottom).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.tiny_flux.scenes import COLOURS, Scene

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

COLOUR_REACH = 0.45
MASK_REACH = 0.5
SHAPE_IOU = 0.7
NEAR, FAR = 0.45, 0.55


@dataclass(frozen=True)
class Verdict:
    """What was seen; None where nothing the judge knows was there."""

    background: str | None
    figure: str | None
    shape: str | None
    centre: tuple[float, float] | None

    def background_right(self, scene: Scene) -> bool:
        return self.background == scene.background

    def figure_right(self, scene: Scene) -> bool:
        return self.figure == scene.figure

    def shape_right(self, scene: Scene) -> bool:
        return self.shape == scene.shape

    def position_right(self, scene: Scene) -> bool:
        if scene.position is None:
            return True
        if self.centre is None:
            return False
        x, y = self.centre
        return {"left": x < NEAR, "right": x > FAR, "top": y < NEAR, "bottom": y > FAR}[scene.position]

    def all_right(self, scene: Scene) -> bool:
        return (
            self.background_right(scene)
            and self.figure_right(scene)
            and self.shape_right(scene)
            and self.position_right(scene)
        )


def _name(colour: Array) -> str | None:
    distance = {n: float(np.linalg.norm(colour - (np.array(c) * 2 - 1))) for n, c in COLOURS.items()}
    best = min(distance, key=lambda n: distance[n])
    return best if distance[best] < COLOUR_REACH else None


def _erode(mask: Mask, rounds: int = 1) -> Mask:
    for _ in range(rounds):
        padded = np.pad(mask, 1, mode="edge")
        views = [padded[r : r + mask.shape[0], c : c + mask.shape[1]] for r in range(3) for c in range(3)]
        mask = np.logical_and.reduce(views)
    return mask


def _dilate(mask: Mask) -> Mask:
    return ~_erode(~mask)


def _templates(height: int, width: int) -> dict[str, Mask]:
    y = ((np.arange(height) + 0.5) / height)[:, None]
    x = ((np.arange(width) + 0.5) / width)[None, :]
    return {
        "square": np.ones((height, width), dtype=bool),
        "circle": (2 * x - 1) ** 2 + (2 * y - 1) ** 2 <= 1,
        "triangle": np.abs(2 * x - 1) <= y,
    }


def judge(picture: NDArray[np.uint8]) -> Verdict:
    """Return what an 8-bit RGB picture [height, width, 3] shows."""
    pixels = picture.astype(np.float64) / 127.5 - 1
    frame = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )
    ground: Array = np.median(frame, axis=0)
    far: Mask = np.linalg.norm(pixels - ground, axis=-1) > MASK_REACH
    mask = _dilate(_erode(far))
    background = _name(ground)
    if background is None or mask.sum() < 40:
        return Verdict(background, None, None, None)
    core = _erode(mask, 2)
    figure = _name(np.median(pixels[core if core.any() else mask], axis=0))
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    score = {n: float((box & t).sum() / (box | t).sum()) for n, t in _templates(*box.shape).items()}
    shape = max(score, key=lambda n: score[n])
    centre = (float(columns.mean() + 0.5) / mask.shape[1], float(rows.mean() + 0.5) / mask.shape[0])
    return Verdict(background, figure, shape if score[shape] >= SHAPE_IOU else None, centre)


def score(pictures: list[NDArray[np.uint8]], scenes: list[Scene]) -> dict[str, float]:
    """Return the share (0 to 1) of pictures right in each respect, and in all; position over those that ask for one."""
    verdicts = [judge(p) for p in pictures]
    pairs = list(zip(verdicts, scenes, strict=True))
    placed = [(v, s) for v, s in pairs if s.position is not None]

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(hits)

    return {
        "background": share([v.background_right(s) for v, s in pairs]),
        "figure": share([v.figure_right(s) for v, s in pairs]),
        "position": share([v.position_right(s) for v, s in placed]),
        "shape": share([v.shape_right(s) for v, s in pairs]),
        "all": share([v.all_right(s) for v, s in pairs]),
    }
