"""The log beside the outputs: one JSON object a line, of each run that began there and of each output it gave."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from engine import files
from engine.run.items import Item
from engine.run.runner import Made

NAME = "dg-run.jsonl"
SCHEMA = "dg-run/log@1"
_MOST_READ_BYTES = 256 * 1024**2


class Journal:
    """The log of a folder. What cannot be written is told once, and keeps no output from being made."""

    def __init__(self, folder: Path, warn: Any) -> None:
        self._path, self._warn, self._is_told = folder / NAME, warn, False

    def begin(self, job: str, seed: int, count: int) -> None:
        """Say that a run begins: by its job and seed it is known again."""
        self._add({"event": "run", "job": job, "seed": seed, "count": count})

    def add(self, made: Made, item: Item, path: Path) -> None:
        """Say what an output is, what was predicted of the call that made it, and what was measured."""
        plan, call = made.plan, made.call
        self._add(
            {
                "event": "output",
                "file": path.name,
                "broken": made.is_broken(item),
                "number": item.number,
                "prompt": item.prompt,
                "negative_prompt": item.negative_prompt,
                "seed": item.seed,
                "image": item.image,
                "model": plan.request.model,
                "revision": plan.request.revision,
                "plan_digest": plan.digest,
                "profile": None if plan.profile is None else plan.profile.name,
                "optimizers": [str(s) for s in plan.optimizers],
                "outputs_at_a_time": len(call.items),
                "predicted_peak_bytes": plan.estimate.peak_allocated_bytes,
                "measured_peak_bytes": made.peak_bytes,
                "predicted_s": plan.estimate.seconds,
                "measured_s": round(made.seconds, 4),
                "versions": dict(plan.versions),
            }
        )

    def seed_of(self, job: str) -> int | None:
        """Return the seed that a run of this job began with here, the latest of several; None where there was none."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MOST_READ_BYTES)
        except OSError:
            return None
        found = None
        for line in text.splitlines():
            try:
                said = json.loads(line)
            except (ValueError, RecursionError):  # cut off, or somebody else's
                continue
            if isinstance(said, dict) and said.get("event") == "run" and said.get("job") == job:
                found = said.get("seed")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def _add(self, event: dict[str, Any]) -> None:
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = json.dumps({"schema": SCHEMA, "when": when} | event, ensure_ascii=False, separators=(",", ":"))
        try:
            files.append_line(self._path, line.encode())
        except OSError as error:
            if not self._is_told:
                self._warn(f"warning: the log {self._path} cannot be written ({error.strerror or error})")
            self._is_told = True
