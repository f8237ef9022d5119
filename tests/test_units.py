"""Sizes: what is written is what is meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.units import GIB, format_seconds, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("12GiB", 12 * GIB), ("7.2 GiB", int(7.2 * GIB)), ("8 GB", 8 * 10**9), ("512mib", 512 * 1024**2), (" 1B ", 1)],
)
def test_sizes_with_units(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "12", "GiB", "-1GiB", "0GiB", "1e3GiB", "12 gigs", "nan GiB", "inf GiB", "9" * 400 + "B", "2000TiB", "٣GiB"],
)
def test_what_is_no_size_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(st.integers(min_value=1, max_value=1024**5))
def test_bytes_survive_being_written(size_bytes: int) -> None:
    assert parse_size(f"{size_bytes}B") == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(GIB, "1.00 GiB"), (512 * 1024**2, "0.50 GiB"), (5 * 1024**2, "5.0 MiB"), (2048, "2 KiB"), (17, "17 B")],
)
def test_sizes_for_reading(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(("time_s", "text"), [(0.421, "0.42 s"), (12.3, "12 s"), (200, "3 min 20 s")])
def test_times_for_reading(time_s: float, text: str) -> None:
    assert format_seconds(time_s) == text
