"""`dg-run profiles list|show`: the team's side."""

from __future__ import annotations

from engine import paths, profiles
from engine.cli import options
from engine.errors import UsageError
from engine.units import format_size
from engine.values import Match, Profile
from engine.words import did_you_mean


def parser() -> options.Parser:
    """Return the parser of `dg-run profiles`."""
    made = options.Parser("dg-run profiles", "List the profiles, or show one: its text, checked.")
    made.add_argument("action", metavar="list|show", help="list them all, or show one")
    made.add_argument("name", nargs="?", metavar="NAME|FILE", help="which one to show")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def run(arguments: list[str]) -> int:
    """List profiles, or show one."""
    given = parser().read(arguments)
    if given.action == "list" and given.name is None:
        return _list()
    if given.action == "show" and given.name is not None:
        return _show(given.name)
    if given.action in ("list", "show"):
        raise UsageError(f"dg-run profiles {given.action} takes {'no name' if given.action == 'list' else 'one name'}")
    raise UsageError(f"dg-run profiles has no action {given.action!r}", do=did_you_mean(given.action, ("list", "show")))


def _list() -> int:
    for profile in profiles.built_in():
        print(f"{profile.name:<12} {profile.version:<7} {profile.source:<9} {_when(profile.match)}")
        print(f"{'':<12} {profile.summary}")
        print(f"{'':<12} {' → '.join(map(str, profile.steps))}\n")
    return 0


def _when(match: Match) -> str:
    parts = []
    if match.device is not None:
        parts.append("without an accelerator" if match.device == "cpu" else f"on {match.device}")
    if match.free_vram_at_least_bytes is not None:
        parts.append(f"from {format_size(match.free_vram_at_least_bytes)} of free VRAM")
    if match.pixels_at_least is not None:
        parts.append(f"from {match.pixels_at_least:,} pixels")
    return ", ".join(parts) or "anywhere"


def _show(name: str) -> int:
    profile: Profile = profiles.find(name)
    file = paths.data_dir("profiles") / f"{profile.name}.yaml" if profile.source == profiles.BUILT_IN else None
    print(f"# {profile.name} {profile.version}, {profile.source}: valid")
    from pathlib import Path

    print((file or Path(profile.source).expanduser()).read_text(encoding="utf-8"), end="")
    return 0
