"""What is chosen on real cards for real models: each file says why a person who knows the field would agree.

Traces that are shipped serve most of them, and one file of answers each model: so they stay together on one worker.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import scenarios

CARDS = sorted((Path(__file__).parent / "scenarios" / "cards").glob("*.yaml"))


# Each of these replays for several seconds: `make slow` runs them.
LONG = (
    "flux-2048-on-24gib",
    "flux-4096-on-80gib",
    "flux-busy-4090",
    "flux-on-10gib",
    "flux-on-6gib",
    "flux-on-8gib-32gib-ram",
    "flux-on-a-t4",
    "flux-on-mig-10gib",
    "flux-schnell-on-12gib",
    "flux-staged-on-12gib-32gib-ram",
    "pixart-on-8gib",
    "pixart-staged-on-12gib-16gib-ram",
    "qwen-on-12gib",
    "qwen-on-24gib",
    "qwen-on-24gib-64gib-ram",
    "sd15-batch-of-eight-on-6gib",
    "sd15-on-a-t4",
    "sd35m-on-10gib",
    "sd35m-on-16gib",
    "sd35m-on-24gib",
    "sd35m-on-6gib",
    "sd35m-on-8gib",
    "sd35m-on-8gib-16gib-ram",
    "sdxl-2048-on-12gib",
    "sdxl-2048-on-24gib",
    "sdxl-batch-of-four-on-12gib",
    "sdxl-busy-4090",
    "sdxl-forbids-resident",
    "sdxl-on-8gib",
    "sdxl-on-8gib-little-ram",
    "sdxl-requires-tiling",
    "wan-on-12gib",
    "wan-on-24gib",
    "wan-on-48gib",
    "wan-on-8gib",
)


def _marked(path: Path) -> object:
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])


@pytest.mark.parametrize("path", [_marked(p) for p in CARDS])
def test_what_is_chosen(path: Path) -> None:
    assert scenarios.run(scenarios.load(path)).differences == ()


def test_there_are_sixty_of_them_at_least() -> None:
    assert len(CARDS) >= 60
