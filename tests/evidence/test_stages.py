"""Text encoders that are gone before the rest is there."""

from __future__ import annotations

import pytest

from tests.evidence import small
from truth import pipelines


@pytest.mark.rule("staged-encoding-needs-its-prompts")
def test_without_its_text_encoders_a_pipeline_takes_no_prompt() -> None:
    from engine.run import stages

    pipe, call = pipelines.made("pixart")
    plain = small.draw(pipe, call)
    encoded = stages.encode(pipe, call, "cpu")
    pipe.text_encoder = None
    with stages.given(pipe, encoded, "cpu"):
        assert small.alike(small.draw(pipe, call), plain)
    with pytest.raises((TypeError, AttributeError)):
        small.draw(pipe, call | {"prompt": "another"})
