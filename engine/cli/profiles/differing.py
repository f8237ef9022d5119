"""`dg-run profiles diff`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import profiles, review
from engine.cli import options, requests
from engine.errors import ProfileError, UsageError
from engine.profiles import changes, wording
from engine.review import Answer, Changed, Side
from engine.units import format_seconds, format_size
from engine.values import Profile


def diff_parser() -> options.Parser:
    """Return the parser of `dg-run profiles diff`."""
    made = options.Parser(
        "dg-run profiles diff",
        "Show what two profiles, or two folders of profiles, differ in by what they mean, and which plans change and\n"
        "by how much: for the requests of a file, or for usual models on usual cards.",
    )
    made.add_argument("before", metavar="A", help="a profile's name or file, or a folder")
    made.add_argument("after", metavar="B", help="the same, after the change")
    made.add_argument(
        "--requests", type=Path, metavar="FILE.jsonl", help="requests as for `dg-run plan --requests`, one a line"
    )
    made.add_argument("--no_plans", action="store_true", help="show what the profiles differ in, and make no plans")
    made.add_argument("--exit_code", action="store_true", help="end with 3 when anything differs (else with 0)")
    made.add_argument("--json", action="store_true", help="print it as JSON")
    return made


@dataclass(frozen=True, slots=True)
class Differs:
    """A profile that one side has not, or has otherwise."""

    name: str
    kind: str
    lines: tuple[str, ...]


def run_diff(given: argparse.Namespace) -> int:
    """Print what differs."""
    if given.no_plans and given.requests is not None:
        raise UsageError("--requests and --no_plans contradict each other", do="leave one of them out")
    (before, old), (after, new) = _side(given.before), _side(given.after)
    if (before.folder is None) != (after.folder is None):
        raise UsageError(
            "a folder cannot be held against a profile",
            f"of {given.before} and {given.after} one is a folder",
            "give two of them",
        )
    differing = tuple(_differing(old, new, before.folder is None))
    asked = [] if given.no_plans else list(_requests(given.requests))
    changed = review.compare(asked, before, after, _tell)
    if given.json:
        print(json.dumps(_as_json(differing, len(asked), changed), indent=2, ensure_ascii=False))
    else:
        _print(differing, len(asked), changed)
    return ProfileError.exit_code if given.exit_code and (differing or changed) else 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _side(name: str) -> tuple[Side, dict[str, Profile]]:
    """Return one side, and its profiles by name. Raises: ProfileError, where one is not valid."""
    folder = Path(name)
    if not folder.is_dir():
        found = profiles.find(name)
        return Side(profile=name), {found.name: found}
    with profiles.only(folder):
        own = [f for f in profiles.listed() if f.source != profiles.BUILT_IN]
    for one in own:
        if one.error is not None:
            raise one.error
    return Side(folder=folder), {f.name: f.profile for f in own if f.profile is not None}


def _differing(old: Mapping[str, Profile], new: Mapping[str, Profile], are_single: bool) -> Iterator[Differs]:
    if are_single:
        ((was,), (now,)) = (old.values(), new.values())
        if lines := changes.between(was, now):
            yield Differs(was.name if was.name == now.name else f"{was.name} → {now.name}", "changed", lines)
        return
    for name in dict.fromkeys((*old, *new)):
        if name not in new:
            yield Differs(name, "removed", (_told(old[name]),))
        elif name not in old:
            yield Differs(name, "added", (_told(new[name]),))
        elif lines := changes.between(old[name], new[name]):
            yield Differs(name, "changed", lines)


def _told(profile: Profile) -> str:
    return f"{wording.called(profile)}, {wording.match(profile.match)}: {' → '.join(map(wording.short, profile.slots))}"


def _requests(path: Path | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path is None:
        for request in review.USUAL:
            yield str(request["id"]), {k: v for k, v in request.items() if k != "id"}
        return
    for number, line in requests.lines(path):
        request = requests.parsed(line, number)
        yield str(request.get("id", number)), requests.arguments(request)


def _print(differing: Sequence[Differs], asked: int, changed: Sequence[Changed]) -> None:
    for one in differing:
        print(f"{one.name}: {one.kind}")
        for line in one.lines:
            print(f"  {line}")
    if not differing:
        print("The profiles mean the same.")
    if asked:
        print(f"\n{len(changed)} of {asked} plans change{':' if changed else '.'}")
    for plan in changed:
        print(f"  {plan.id}")
        for line in _lines(plan.before, plan.after):
            print(f"    {line}")


def _lines(before: Answer, after: Answer) -> Iterator[str]:
    """Yield what one plan changed in."""
    if before.error != after.error:
        yield f"{_outcome(before)} → {_outcome(after)}"
        return
    if (before.profile, before.fits) != (after.profile, after.fits):
        yield f"profile: {_outcome(before)} → {_outcome(after)}"
    if before.profile is None or after.profile is None:
        return  # what it takes now is in the other's plan, and there is none to hold it against
    was, now = ([str(s) for s in a.optimizers] for a in (before, after))
    if was != now:
        yield f"optimizers: {', '.join(was) or 'none'} → {', '.join(now) or 'none'}"
    yield from _amount("card", before.required_bytes, after.required_bytes, format_size)
    yield from _amount("host", before.host_bytes, after.host_bytes, format_size)
    yield from _amount("time", before.seconds, after.seconds, format_seconds)
    if before.quality != after.quality:
        yield f"quality: {before.quality or 'not known'} → {after.quality or 'not known'}"


def _outcome(answer: Answer) -> str:
    if answer.error is not None:
        return f"refused ({answer.error})"
    if answer.profile is None:
        return "nothing fits"
    return answer.profile + {True: "", False: " (does not fit)", None: " (whether it fits is not known)"}[answer.fits]


def _amount(name: str, was: Any, now: Any, say: Any) -> Iterator[str]:
    if was == now:
        return
    if was is None or now is None:
        yield f"{name}: {'not known' if was is None else say(was)} → {'not known' if now is None else say(now)}"
        return
    yield f"{name}: {say(was)} → {say(now)} ({'+' if now > was else '-'}{say(abs(now - was))})"


def _as_json(differing: Sequence[Differs], asked: int, changed: Sequence[Changed]) -> dict[str, Any]:
    return {
        "profiles": [{"name": d.name, "kind": d.kind, "changes": list(d.lines)} for d in differing],
        "plans": {"asked": asked, "changed": [dataclasses.asdict(c) for c in changed]},
    }
