"""What is chosen on real cards for real models: each file says why a person who knows the field would agree.

Traces that are shipped serve most of them, and one file of answers each model: so they stay together on one worker.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import scenarios

CARDS = sorted((Path(__file__).parent / "scenarios" / "cards").glob("*.yaml"))


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_what_is_chosen(path: Path) -> None:
    assert scenarios.run(scenarios.load(path)).differences == ()


def test_there_are_sixty_of_them_at_least() -> None:
    assert len(CARDS) >= 60
