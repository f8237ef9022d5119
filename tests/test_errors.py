"""The exception tree owns the exit codes, and the documented table is the tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import engine
from engine import errors

DOCUMENTED = {
    "DgRunError": 1,
    "UsageError": 2,
    "ProfileError": 3,
    "IncompatibleError": 3,
    "NothingFitsError": 4,
    "ModelError": 5,
    "HardwareError": 6,
    "OutOfMemoryError": 7,
    "FileError": 8,
}


def _tree(cls: type[errors.DgRunError]) -> Iterator[type[errors.DgRunError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


def test_every_class_has_its_documented_exit_code() -> None:
    own = {c.__name__: c.exit_code for c in _tree(errors.DgRunError) if c.__module__ == "engine.errors"}
    assert own == DOCUMENTED


def test_the_documentation_lists_every_exit_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = {int(m[1]) for m in re.finditer(r"^\| (\d+) \|", text, re.MULTILINE)}
    assert listed == {0, errors.INTERRUPTED_EXIT_CODE, *DOCUMENTED.values()}


def test_public_errors_are_the_tree() -> None:
    assert {n for n in engine.__all__ if n.endswith("Error")} == set(DOCUMENTED)


def test_an_error_is_told_in_three_parts() -> None:
    error = errors.ModelError("what happened", "the reason", "the remedy")
    assert str(error).splitlines() == ["what happened", "  why: the reason", "  do:  the remedy"]


def test_every_error_comes_whole_out_of_another_process() -> None:
    """By the arguments of its class it would not be made again, and who waits for the answer would wait for ever."""
    import pickle

    from engine.optimizers.spec import NotApplied

    for made in (NotApplied("dtype", "vae is float32"), errors.FileError("a", "b", "c"), errors.DgRunError("a")):
        again = pickle.loads(pickle.dumps(made))  # noqa: S301 - our own
        assert (type(again), str(again), again.args, vars(again)) == (type(made), str(made), made.args, vars(made))
