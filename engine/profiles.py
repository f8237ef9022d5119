"""Find, read and check profiles. To add a built-in one: a file in `profiles/`, named for the profile."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from engine import compat, documents, optimizers, paths, validation
from engine.documents import Document, DocumentError, Problem
from engine.errors import DgRunError, ProfileError
from engine.units import parse_size
from engine.values import Match, Profile, Slot, Step
from engine.words import did_you_mean

BUILT_IN = "built-in"


@cache
def built_in() -> tuple[Profile, ...]:
    """Return the shipped profiles, from the most frugal to the most lavish."""
    found = [load(path, BUILT_IN) for path in paths.data_dir("profiles").glob("*.yaml")]
    return tuple(
        sorted(found, key=lambda p: (p.match.device is not None, p.match.free_vram_at_least_bytes or 0, p.name))
    )


def find(name: str) -> Profile:
    """Return a profile by built-in name or by file path. Raises: ProfileError."""
    if name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name:
        return load(Path(name).expanduser(), name)
    for profile in built_in():
        if profile.name == name:
            return profile
    here = " (a file of that name is here: give its path, such as ./NAME.yaml)" if Path(name).exists() else ""
    raise ProfileError(
        f"there is no profile {name!r}",
        "it is neither built in nor the path of a .yaml file" + here,
        did_you_mean(name, [p.name for p in built_in()]),
    )


def visible() -> tuple[Profile, ...]:
    return built_in()


def chain(name: str) -> tuple[Profile, ...]:
    return (find(name),)


def load(path: Path, source: str) -> Profile:
    """Return the profile in a file. Raises: ProfileError, with file, line and column of every problem."""
    try:
        document = documents.read(path)
        validation.check_once(document, "profile")
        return _profile(document, source)
    except DocumentError as error:
        raise error.told(ProfileError, "this is not a valid profile") from None
    except OSError as error:
        raise ProfileError(
            f"{path}: the profile cannot be read",
            str(error.strerror or error),
            "`dg-run profiles list` shows those that can",
        ) from None


def _profile(document: Document, source: str) -> Profile:
    value: dict[str, Any] = document.value
    match = value.get("match", {})
    free_vram = match.get("free_vram", {}).get("at_least")
    steps = tuple(_step(document, i, entry) for i, entry in enumerate(value["optimizers"]))
    _refuse_repeats(document, steps)
    _refuse_broken_rules(document, steps)
    return Profile(
        name=value["name"],
        version=value["version"],
        summary=value["summary"],
        match=Match(
            device=match.get("device"),
            free_vram_at_least_bytes=None if free_vram is None else _size(document, free_vram),
            pixels_at_least=match.get("pixels", {}).get("at_least"),
        ),
        slots=tuple(Slot(alternatives=((step,),)) for step in steps),
        source=source,
    )


def _size(document: Document, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        place = document.place(("match", "free_vram", "at_least"))
        raise DocumentError(document.source, document.text, [Problem(place, str(error))]) from None


def _step(document: Document, index: int, entry: str | dict[str, Any]) -> Step:
    if isinstance(entry, str):
        return optimizers.spec(entry).step()
    ((name, params),) = entry.items()
    try:
        spec = optimizers.spec(name)
        return spec.step({"value": params} if spec.scalar else params)
    except DgRunError as error:
        place = document.place(("optimizers", index))
        raise DocumentError(document.source, document.text, [Problem(place, error.what, error.do)]) from None


def _refuse_repeats(document: Document, steps: tuple[Step, ...]) -> None:
    names = [s.name for s in steps]
    problems = [
        Problem(document.place(("optimizers", i)), f"{name} is listed twice", "keep one of them")
        for i, name in enumerate(names)
        if name in names[:i]
    ]
    if problems:
        raise DocumentError(document.source, document.text, problems)


def _refuse_broken_rules(document: Document, steps: tuple[Step, ...]) -> None:
    """A profile is judged by the rules that need no model and no machine."""
    names = [s.name for s in steps]
    facts = compat.Facts(libraries=compat.installed())
    broken = [f for f in compat.under(facts).findings(steps) if f.breaks]
    if broken:
        problems = [
            Problem(
                document.place(("optimizers", names.index(f.subjects[-1]))),
                f"{f.sentence}: {f.rule.because} (rule {f.rule.id})",
                f.rule.remedy,
            )
            for f in broken
        ]
        raise DocumentError(document.source, document.text, problems)
