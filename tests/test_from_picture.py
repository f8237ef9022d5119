"""The tables of pipelines that begin with a picture are those of diffusers."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from engine.facts import from_picture

pytestmark = pytest.mark.slow  # all of these classes are imported, which takes half a minute

ALONE = [*from_picture._ANIMATES, *from_picture._EDITS]


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def test_the_pairs_are_those_that_diffusers_goes_by() -> None:
    from diffusers.pipelines import auto_pipeline as auto

    words = {**auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, **auto.AUTO_TEXT2VIDEO_PIPELINES_MAPPING}
    pictures = {**auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, **auto.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING}
    theirs = {w.__name__: pictures[k].__name__ for k, w in words.items() if k in pictures}
    ours = from_picture.REDRAWING | from_picture.ANIMATING
    beyond = {"ChromaPipeline", "LTX2Pipeline"}  # in diffusers, and not in its tables
    assert {w: p for w, p in ours.items() if w not in beyond}.items() <= theirs.items()
    left_out = {w for w in theirs if w not in ours and from_picture.pipeline_for(w) != theirs[w]}
    # They want the picture of another model beside it, or are several pipelines in one.
    assert all("Control" in w or "Combined" in w for w in left_out), left_out


@pytest.mark.parametrize(("words", "picture"), (from_picture.REDRAWING | from_picture.ANIMATING).items())
def test_both_of_a_pair_are_made_of_the_same_components(words: str, picture: str) -> None:
    one, other = (inspect.signature(_class(n).__init__).parameters for n in (words, picture))
    assert set(one) ^ set(other) <= {"requires_aesthetics_score"}
    assert ("strength" in inspect.signature(_class(picture).__call__).parameters) == (
        from_picture.takes_strength(picture)
    )


@pytest.mark.parametrize("name", [*from_picture.REDRAWING.values(), *from_picture.ANIMATING.values(), *ALONE])
def test_all_of_them_take_a_picture_and_no_mask(name: str) -> None:
    taken = inspect.signature(_class(name).__call__).parameters
    assert "image" in taken
    assert not {"mask_image", "control_image"} & set(taken)
    assert from_picture.pipeline_for(name) == name


@pytest.mark.parametrize("name", from_picture.REDRAWING.values())
@pytest.mark.parametrize(("steps", "strength"), [(8, 0.6), (8, 0.05), (10, 0.99), (3, 1.0)])
def test_the_steps_that_are_taken_are_the_pipelines_own(name: str, steps: int, strength: float) -> None:
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=list(range(steps)), order=1, config={}))
    pipe.scheduler.set_begin_index = lambda index: None
    extra = (None, None) if "XL" in name or "Kolors" in name else (None,)
    got = _class(name).get_timesteps(pipe, steps, strength, *extra[: _more(name)])[0]
    assert from_picture.steps_taken(name, steps, strength) == len(got)


def _more(name: str) -> int:
    """Return how many arguments of `get_timesteps` have no default beyond the first two."""
    taken = list(inspect.signature(_class(name).get_timesteps).parameters.values())[3:]
    return sum(p.default is p.empty for p in taken)
