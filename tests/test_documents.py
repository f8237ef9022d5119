"""The YAML door: only what is meant, and every value's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import documents
from engine.documents import DocumentError, Place

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def problems(text: str) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        documents.parse(text, "f.yaml")
    return [f"{p.place.line}:{p.place.column} {p.what}" if p.place else p.what for p in caught.value.problems]


def test_words_that_yaml_1_1_would_change_stay_words() -> None:
    text = "norway: no\nswitch: on\nratio: 16:9\nday: 2020-01-01\noctal: 010\nhex: 0x10\nunder: 1_000\nsize: 8GiB\n"
    value = documents.parse(text, "f").value
    assert value == {
        "norway": "no",
        "switch": "on",
        "ratio": "16:9",
        "day": "2020-01-01",
        "octal": 10,
        "hex": "0x10",
        "under": "1_000",
        "size": "8GiB",
    }


def test_plain_values() -> None:
    assert documents.parse("[true, False, null, ~, 3, -4, 1.5, 2e3, .5]", "f").value == [
        True,
        False,
        None,
        None,
        3,
        -4,
        1.5,
        2000.0,
        0.5,
    ]


def test_places_count_from_one() -> None:
    document = documents.parse("a: 1\nb:\n  - c: x\n", "f")
    assert document.place(("a",)) == Place(1, 4)
    assert document.place(("b", 0, "c")) == Place(3, 8)
    assert document.place(("b", 0, "c"), key=True) == Place(3, 5)
    assert document.place(("b", 0, "missing")) == Place(3, 5)


def test_a_key_that_occurs_twice_is_named_with_both_lines() -> None:
    assert problems("a: 1\nb: 2\na: 3\n") == ["3:1 the key 'a' is here twice (first on line 1)"]


def test_all_problems_are_told_at_once() -> None:
    assert len(problems("a: 1\na: 2\n1: x\n? [k]\n: v\n")) == 3


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: !!python/object/apply:os.system [echo]", "not allowed"),
        ("a: !!binary aGk=", "not allowed"),
        ("a: !own x", "not allowed"),
        ("a:\n\tb: 1", "found a tab character that indents"),
        ("a: [1", "expected"),
        ("a: *nowhere", "undefined alias"),
        ("a: \x00", "not allowed in YAML"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("a: 123456789012345678901234567890", "too long"),
        ("[" * 60 + "]" * 60, "levels"),
        ("[" * 5000, ""),
        ("true: 1", "plain word"),
    ],
)
def test_what_is_refused(text: str, part: str) -> None:
    assert part in problems(text)[0]


def test_a_bomb_is_refused_before_it_grows() -> None:
    assert "values once its aliases are followed" in problems(BOMB)[0]


def test_an_alias_within_bounds_is_fine() -> None:
    assert documents.parse("a: &x [1, 2]\nb: *x\n", "f").value == {"a": [1, 2], "b": [1, 2]}


def test_large_and_binary_files_are_refused(tmp_path: Path) -> None:
    large, binary = tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_bytes(b"#" * (documents.MAX_FILE_BYTES + 1))
    binary.write_bytes(b"a: 1\nb: \xff\xfe\n")
    for path, part in ((large, "larger than"), (binary, "not UTF-8")):
        with pytest.raises(DocumentError) as caught:
            documents.read(path)
        assert part in caught.value.problems[0].what


@given(st.text(max_size=200))
def test_no_text_whatever_gets_anything_but_a_value_or_a_document_error(text: str) -> None:
    try:
        documents.parse(text, "f")
    except DocumentError as error:
        assert error.problems


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abcdef", min_size=1, max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values, st.booleans())
def test_json_is_read_as_what_it_says(value: object, is_ascii: bool) -> None:
    assert documents.parse_json(json.dumps(value, ensure_ascii=is_ascii), "f").value == value


def test_what_is_json_and_not_yaml_is_read_as_json() -> None:
    assert documents.parse_json('{"a": "\x7f", "b": "\\ud83d\\ude00", "c": [1e400]}', "f").value["b"] == "\U0001f600"


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_not_usable_json_is_refused(text: str) -> None:
    with pytest.raises(DocumentError) as caught:
        documents.parse_json(text, "f")
    assert caught.value.problems
