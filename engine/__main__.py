"""`python -m engine` is `dg-run`."""

from engine.cli import entry

entry()
