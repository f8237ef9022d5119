"""`dg-run profiles`: the team's side. A module an action; here is only which one is meant."""

from __future__ import annotations

from importlib import import_module

from engine.cli import options
from engine.errors import UsageError
from engine.words import did_you_mean

ACTIONS = {
    "list": "which profiles there are here, where each comes from, and what it shadows",
    "show": "one profile: its text, and what it takes over from its parent",
    "lint": "check files: every problem with its place; for a hook, for CI",
    "diff": "what two profiles, or two folders of them, differ in, and which plans change",
    "test": "run a team's scenarios against its profiles",
    "new": "write the skeleton of a profile, with comments",
    "schema": "print the schema of profiles, for an editor",
}
_HOMES = {
    "list": "showing",
    "show": "showing",
    "lint": "linting",
    "diff": "differing",
    "test": "trying",
    "new": "making",
    "schema": "making",
}


def parser(action: str | None = None) -> options.Parser:
    """Return the parser of an action, or of the command as a whole."""
    if action is not None:
        made: options.Parser = getattr(import_module(_home(action)), f"{action}_parser")()
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        return made
    listed = "\n".join(f"  {name:<7} {about}" for name, about in ACTIONS.items())
    whole = options.Parser(
        "dg-run profiles",
        f"Profiles say what may be done to make a run fit. An action is one of\n\n{listed}\n\n"
        "`dg-run profiles ACTION --help` tells more of one. How profiles are written: docs/profiles.md.",
    )
    whole.add_argument("action", metavar="ACTION", help="one of these")
    whole.add_argument("--debug", action="store_true", help="show tracebacks")
    return whole


def run(arguments: list[str]) -> int:
    """Run an action; its exit code."""
    if not arguments or arguments[0].startswith("-"):
        parser().read(arguments)
    action = next((a for a in arguments if not a.startswith("-")), "")
    if action not in ACTIONS:
        raise UsageError(f"dg-run profiles has no action {action!r}", do=did_you_mean(action, ACTIONS))
    arguments.remove(action)
    code: int = getattr(import_module(_home(action)), f"run_{action}")(parser(action).read(arguments))
    return code


def _home(action: str) -> str:
    return f"engine.cli.profiles.{_HOMES[action]}"
