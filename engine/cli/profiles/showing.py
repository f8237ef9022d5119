"""`dg-run profiles list|show`."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

from engine import documents, paths, profiles
from engine.cli import options
from engine.profiles import Listed, wording
from engine.values import Profile


def list_parser() -> options.Parser:
    """Return the parser of `dg-run profiles list`."""
    made = options.Parser(
        "dg-run profiles list",
        "List the profiles that are used here: those of ./profiles, of the project's .dg-run/profiles, of your own\n"
        "configuration folder, and the built-in ones. The first of a name is used; what it shadows is said.",
    )
    made.add_argument("--json", action="store_true", help="print them as JSON")
    return made


def run_list(given: argparse.Namespace) -> int:
    """Print every profile that a search comes by; the broken ones too, since they are in the way."""
    found = profiles.listed()
    if given.json:
        print(json.dumps([_as_json(f) for f in found], indent=2, ensure_ascii=False))
        return 0
    width = max(12, *(len(f.name) for f in found))
    for one in found:
        if one.shadowed_by is None:
            _print(one, width)
    hidden = [f for f in found if f.shadowed_by is not None]
    if hidden:
        print("Not used here:")
        for one in hidden:
            print(f"  {one.name:<{width}} {one.source}, shadowed by {one.shadowed_by}")
    return 0


def _print(one: Listed, width: int) -> None:
    profile = one.profile
    if profile is None:
        assert one.error is not None
        print(f"{one.name:<{width}} cannot be used: {one.source}")
        print(f"{'':<{width}} `dg-run profiles lint {one.source}` says why")
    else:
        parent = f", extends {profile.extends}" if profile.extends else ""
        print(f"{one.name:<{width}} {profile.version:<7} {one.source}{parent}")
        print(f"{'':<{width}} {profile.summary}")
        print(f"{'':<{width}} {wording.match(profile.match)}")
        listed = " → ".join(map(wording.short, profile.slots))
        for line in textwrap.wrap(listed, max(40, 120 - width - 1), break_long_words=False, break_on_hyphens=False):
            print(f"{'':<{width}} {line}")
    if one.shadows:
        print(f"{'':<{width}} shadows {', '.join(one.shadows)}")
    print()


def _as_json(one: Listed) -> dict[str, object]:
    profile = one.profile
    return {
        "name": one.name,
        "version": profile and profile.version,
        "summary": profile and profile.summary,
        "source": one.source,
        "path": str(one.path),
        "match": profile and wording.match(profile.match),
        "optimizers": profile and [str(s) for s in profile.slots],
        "extends": profile and profile.extends,
        "fallback": profile and profile.fallback,
        "prefer": profile and profile.prefer,
        "shadows": list(one.shadows),
        "shadowed_by": one.shadowed_by,
        "error": None if one.error is None else one.error.why,
    }


def show_parser() -> options.Parser:
    """Return the parser of `dg-run profiles show`."""
    made = options.Parser(
        "dg-run profiles show",
        "Show one profile: its text, after checking it; where it extends another, also the list that comes of it, and\n"
        "what it overrides.",
    )
    made.add_argument("name", metavar="NAME|FILE", help="which one")
    return made


def run_show(given: argparse.Namespace) -> int:
    """Print one profile."""
    profile = profiles.find(given.name)
    print(f"# {wording.called(profile)}, {profile.source}: valid")
    sys.stdout.write(documents.read_text(_file(given.name, profile)).rstrip("\n") + "\n")
    if profile.extends is not None:
        print(f"\n# with what it takes over from {profile.extends}:")
        print(f"#   match: {wording.match(profile.match)}")
        for key in ("prefer", "fallback"):
            if (value := getattr(profile, key)) is not None:
                print(f"#   {key}: {value}")
        for slot in profile.slots:
            print(f"#   - {slot}")
        print("# overridden:" if profile.overridden else "# nothing is overridden")
        for line in profile.overridden:
            print(f"#   {line}")
    return 0


def _file(name: str, profile: Profile) -> Path:
    if profile.source != profiles.BUILT_IN:
        return Path(profile.source).expanduser()
    return next((f.path for f in profiles.listed() if f.name == name), paths.data_dir("profiles") / f"{name}.yaml")
