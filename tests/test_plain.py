"""YAML that is written is read back as the same values, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import documents, plain

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["1e5", "no", "~", "null", "0x10", "1.", ".5", "2020-01-01", "16:9", "- a", "a: b", "a #b", "&x"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@given(st.dictionaries(st.text(max_size=6), values, max_size=4))
def test_what_is_written_is_read(value: dict[str, Any]) -> None:
    text = plain.yaml(value)
    read = documents.parse(text, "text").value
    assert (read or {}) == value
    assert repr(read or {}) == repr(value)  # 1 is not 1.0, nor true


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        plain.yaml({"a": value})


def test_it_is_for_people() -> None:
    text = plain.yaml({"a": {"free_bytes": 3 * 1024**3}, "steps": [{"name": "dtype", "params": {"value": "bfloat16"}}]})
    assert text == "a:\n  free_bytes: 3221225472  # 3.00 GiB\nsteps:\n  - {name: dtype, params: {value: bfloat16}}\n"
