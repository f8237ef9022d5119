"""`dg-run profiles new|schema`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from engine import profiles, validation
from engine.cli import options
from engine.errors import FileError, UsageError
from engine.profiles import wording
from engine.values import Profile

SCHEMA_FILE = "profile.schema.json"
_HEAD = """\
# yaml-language-server: $schema={schema}
# How profiles are written: docs/profiles.md of dg-run. Check it with: dg-run profiles lint FILE
schema: dg-run/profile@1
name: {name}
version: 0.1.0 # yours: raise it when the meaning changes
summary: what it is for # one line, which `dg-run profiles list` shows
"""
_MATCH = """
# When it may be used. It is permission and no proof: whether a run fits is computed. What is left out is no condition;
# a range goes from at_least up to below, without it.
# match:
#   free_vram: {at_least: 10.8GiB} # with a unit: 8GiB is 8 * 1024^3 bytes, 8GB is 8 * 10^9
#   pixels: {at_least: 1048576, below: 4194304} # of one picture: height times width
#   gpus: ["*RTX 40*"] # names of cards; * stands for anything
#   pipelines: [FluxPipeline, "StableDiffusion*"]
#   device: cuda # or cpu

# When it is asked for by name (--profile {name}):
# prefer: speed # or quality, or vram
# fallback: extreme-low # the profile to go on with, when this one cannot fit
"""
_LIST = """
# Applied in this order. A name alone takes the defaults; `auto` is decided for each request, and so is one_of.
optimizers:
  - dtype: auto
  - vae_slicing
  - one_of: [none, vae_tiling]
  # An alternative can be a list of steps that go together:
  - one_of: [resident, model_offload, [layerwise_casting, model_offload]]
"""


def new_parser() -> options.Parser:
    """Return the parser of `dg-run profiles new`."""
    made = options.Parser(
        "dg-run profiles new",
        "Write the skeleton of a profile, with comments, and beside it the schema that an editor checks it with.\n"
        "A file that is there is never overwritten.",
    )
    made.add_argument("name", metavar="NAME", help="lower-case words joined by hyphens")
    made.add_argument("--extends", metavar="NAME", help="the profile to take everything over from")
    made.add_argument(
        "--output",
        type=Path,
        metavar="FILE.yaml",
        help="where it goes (default: profiles/NAME.yaml, where it is found)",
    )
    return made


def run_new(given: argparse.Namespace) -> int:
    """Write a profile's skeleton, and say where it is."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", given.name) or len(given.name) > 64:
        raise UsageError(f"a profile cannot be called {given.name!r}", "", "write lower-case words joined by hyphens")
    path = given.output or Path("profiles") / f"{given.name}.yaml"
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path} is no name for a profile", "profiles end in .yaml", f"write {path}.yaml")
    parent = None if given.extends is None else profiles.find(given.extends)
    text = _HEAD.format(schema=SCHEMA_FILE, name=_quoted(given.name))
    text += _MATCH.replace("{name}", given.name) if parent is None else _inherited(parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text + (_LIST if parent is None else ""))
        schema = path.parent / SCHEMA_FILE
        is_new = not schema.exists()
        if is_new:
            schema.write_text(validation.schema_text("profile"), encoding="utf-8")
    except FileExistsError:
        raise FileError(f"{path} is there already", "", "give another name or --output") from None
    except OSError as error:
        raise FileError(f"{path} cannot be written", error.strerror or str(error), "check the path") from None
    print(path)
    if is_new:
        print(f"its schema is {schema}; your editor reads it from the first line of {path.name}", file=sys.stderr)
    return 0


def _quoted(name: str) -> str:
    """Return a name as YAML text: one that looks like a number or a switch in quotes."""
    is_plain = not re.fullmatch(r"[0-9]+(e[0-9]+)?|true|false|null|none", name)
    return name if is_plain else f'"{name}"'


def _inherited(parent: Profile) -> str:
    """Return the rest of a skeleton that extends another profile: the parent's own, as comments."""
    slots = "\n".join(f"#   - {s}" for s in parent.slots)
    first = next((s.name for s in parent.steps if s.params), "dtype")
    last = parent.steps[-1].name if parent.steps else first
    return f"""
extends: {_quoted(parent.name)}
# Everything that is not said here is as in {wording.called(parent)}:
#   match: {wording.match(parent.match)}
#   prefer: {parent.prefer or "none"}
#   fallback: {parent.fallback or "none"}
{slots}
# What is said replaces it: match, prefer and fallback whole (`fallback: null` is none), and so does a list of
# `optimizers`. Single steps are edited by their names, in the parent's order:
# set: {{{first}: …}} # parameters over the parent's
# drop: [{last}] # left out
"""


def schema_parser() -> options.Parser:
    """Return the parser of `dg-run profiles schema`."""
    made = options.Parser(
        "dg-run profiles schema",
        "Print the JSON Schema of profiles, for an editor: it completes names and underlines mistakes. Put it beside\n"
        f"your profiles as {SCHEMA_FILE} (`new` does); a first line in a profile leads to it:\n"
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
    )
    made.add_argument("--output", type=Path, metavar="FILE.json", help="write it there, over an older one")
    return made


def run_schema(given: argparse.Namespace) -> int:
    """Print the schema, or write it."""
    text = validation.schema_text("profile")
    if given.output is None:
        sys.stdout.write(text)
        return 0
    try:
        is_ours = not given.output.exists() or _is_schema(given.output)
        if not is_ours:
            raise FileError(f"{given.output} is there already, and is no schema of profiles", "", "give another name")
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{given.output} cannot be written", error.strerror or str(error), "check the path") from None
    print(given.output)
    return 0


def _is_schema(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("title") == "dg-run profile"
