"""What is to be drawn: as texts, objects, and files, each mistake by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import prompts
from engine.errors import DgRunError, FileError, UsageError
from engine.prompts import Prompt
from engine.run import items
from tests.conftest import write


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "﻿a lighthouse\r\n\n  # at dusk \n日本\n")
    assert [p.text for p in prompts.read(path)] == ["a lighthouse", "# at dusk", "日本"]


def test_lines_of_json_say_what_differs_from_the_run(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "a b"}\n{"prompt": "c", "seed": 5, "num_images": 3}\n')
    assert prompts.read(path) == (Prompt(text="a b"), Prompt(text="c", seed=5, num_images=3))


FILES: dict[str, tuple[str, str, str]] = {
    "not JSON": ("p.jsonl", '{"prompt": "a"}\nprompt: b\n', "p.jsonl:2: this is not a prompt as JSON"),
    "a list": ("p.jsonl", "[1]\n", "it is not an object"),
    "another key": ("p.jsonl", '{"promt": "a"}\n', "did you mean 'prompt'?"),
    "no prompt": ("p.jsonl", '{"seed": 1}\n', "p.jsonl:1: there is no prompt"),
    "an empty prompt": ("p.jsonl", '\n{"prompt": " "}\n', "p.jsonl:2: the prompt is empty"),
    "a prompt that is a number": ("p.jsonl", '{"prompt": 1}\n', "p.jsonl:1: the prompt is 1"),
    "a key twice": ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "it has 'prompt' twice"),
    "a NUL": ("p.txt", "a\n\nb\0c\n", "p.txt:3: the prompt has a NUL"),
    "a seed that is true": ("p.jsonl", '{"prompt": "a", "seed": true}\n', "the seed is True"),
    "a seed beyond": ("p.jsonl", '{"prompt": "a", "seed": 4294967296}\n', "between 0 and 4294967295"),
    "no pictures": ("p.jsonl", '{"prompt": "a", "num_images": 0}\n', "num_images is 0"),
    "half a character": ("p.jsonl", '{"prompt": "\\ud800"}\n', "half a character"),
    "no number": ("p.jsonl", '{"prompt": "a", "seed": NaN}\n', "NaN is no JSON"),
    "nested without end": ("p.jsonl", "[" * 100_000 + "\n", "this is not a prompt as JSON"),
    "nothing": ("p.txt", "\n \n", "has no prompts"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, name: str) -> None:
    file, text, part = FILES[name]
    with pytest.raises(FileError) as caught:
        prompts.read(write(tmp_path, file, text))
    assert part in str(caught.value)


def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").mkdir()
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\x00")
    for path, kind in (
        ("p.txt", FileError),
        ("q.txt", FileError),
        ("none.txt", FileError),
        ("a\0.txt", FileError),
        ("p.csv", UsageError),
    ):
        with pytest.raises(kind):
            prompts.read(tmp_path / path)


@pytest.mark.parametrize("given", ["", [], ["a", " "], [{"text": "a"}], [3]])
def test_what_is_no_prompt_is_refused(given: Any) -> None:
    with pytest.raises(DgRunError):
        prompts.of(given)


def test_seeds_and_numbers_do_not_depend_on_how_many_are_made_at_a_time() -> None:
    several = prompts.of(["a", {"prompt": "b", "seed": 2**32 - 1, "num_images": 2}, "c"])
    for batch in (1, 2, 3, 8):
        made = [i for c in items.calls(several, 7, batch, 3) for i in c.items]
        assert [(i.number, i.prompt, i.seed) for i in made] == [
            (0, "a", 7),
            (1, "a", 8),
            (2, "a", 9),
            (3, "b", 2**32 - 1),
            (4, "b", 0),
            (5, "c", 12),
            (6, "c", 13),
            (7, "c", 14),
        ]


def test_as_many_as_fit_in_a_call_and_no_prompt_beside_another() -> None:
    several = prompts.of(["a", "b"])
    assert [len(c.items) for c in items.calls(several, 7, 4, 6)] == [4, 2, 4, 2]
    assert [len(c.items) for c in items.calls(several, 7, 4)] == [4, 4]
    with pytest.raises(UsageError, match="at most 1,000,000"):
        items.calls(prompts.of(["a"] * 11), 7, 4, 100_000)
