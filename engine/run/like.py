"""What an output says of itself, read back: to show it, and to make it again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine import lock
from engine.errors import FileError, UsageError
from engine.lock import Lock
from engine.plan import Plan
from engine.prompts import Prompt
from engine.run import media

_DO = "give a picture or a video that dg-run made, as it was written"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What an output was made with. Its prompt has the output's own seed."""

    prompt: Prompt
    plan: Plan
    image: str | None
    """The SHA-256 of the picture that it began with."""

    @property
    def lock(self) -> Lock:
        """The plan as a lock, by which it is run again exactly. Raises: as `engine.lock.of`."""
        return lock.of(self.plan)


def read(path: str | os.PathLike[str]) -> Found:
    """Return what a file says it was made with. Raises: FileError."""
    where = Path(path)
    said = media.read_record(where)
    try:
        plan_text, prompt, seed = said["dg-run"], said["prompt"], int(said["seed"])
    except (KeyError, ValueError):
        raise FileError(f"{where} does not say what it was made with", "its record is not dg-run's", _DO) from None
    plan = Plan.from_json(plan_text, f"the plan in {where}")
    try:
        own = Prompt(text=prompt, negative_prompt=said.get("negative_prompt"), seed=seed)
    except UsageError as error:
        raise FileError(f"{where} does not say what it was made with: {error.what}", error.why, _DO) from None
    return Found(
        prompt=own,
        plan=plan,
        image=said.get("image"),
    )
