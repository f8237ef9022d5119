"""The plan: a plain value that says what would be run, and on what grounds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import documents, validation
from engine.documents import DocumentError
from engine.errors import FileError
from engine.values import (
    Advice,
    Device,
    Estimate,
    FrozenDict,
    Gpu,
    Hardware,
    Note,
    ProfileRef,
    Rejection,
    Request,
    Rung,
    Step,
    plain,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.lock import Lock
    from engine.prompts import Prompt
    from engine.run.media import Video

SCHEMA = "dg-run/plan@1"

# What was seen or allowed on one machine, not what would be run. A profile counts by name, version and steps,
# not by the path it was found at.
_SEEN = ("device", "gpu", "vram_bytes", "host_ram_bytes", "headroom_bytes", "profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What would be run. `fits` is None where it is not known; `rejected` says why each other profile was not taken."""

    schema: str = SCHEMA
    request: Request
    hardware: Hardware
    device: Device | None
    profile: ProfileRef | None
    optimizers: tuple[Step, ...]
    estimate: Estimate
    budget_bytes: int | None
    headroom_bytes: int | None
    fits: bool | None
    rejected: tuple[Rejection, ...]
    notes: tuple[Note, ...]
    digest: str
    versions: Mapping[str, str | None]
    advice: tuple[Advice, ...] | None = None
    """The nearest changes that would allow more (`engine.advise`); None where nobody has looked."""
    ladder: tuple[Rung, ...] | None = None
    """What a run goes down to when its memory runs out (`engine.ladder`), in turn; None where nobody has looked."""
    locked: bool = False
    """Whether it came of a lock, and is run exactly as it is."""

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the plan as JSON, which `schema/plan.schema.json` describes."""
        return json.dumps(plain(self), indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the plan") -> Plan:
        """Return the plan in a JSON text. Raises: FileError, when it is not valid or its digest does not match."""
        try:
            document = documents.parse_json(text, source)
            validation.check(document, "plan")
        except DocumentError as error:
            raise error.told(FileError, "this is not a valid plan") from None
        plan: Plan = build(cls, document.value)
        if plan.digest != digest(plan.request, plan.profile, plan.optimizers):
            raise FileError(
                f"{source}: the plan's digest does not match its content",
                "it was changed after it was made",
                "make the plan again, instead of editing it",
            )
        return plan

    def without_identity(self) -> Plan:
        """Return the plan without what names this one card and its users, for files that travel."""
        gpus = tuple(dataclasses.replace(g, uuid=None, processes=()) for g in self.hardware.gpus)
        return dataclasses.replace(
            self,
            hardware=dataclasses.replace(self.hardware, gpus=gpus),
            device=None if self.device is None else dataclasses.replace(self.device, uuid=None),
            request=dataclasses.replace(self.request, gpu=None),
        )

    @property
    def card(self) -> Gpu | None:
        """The card (or MIG instance) that the plan is for, as it was seen."""
        if self.device is None:
            return None
        meant = [g for g in self.hardware.gpus if (g.uuid, g.index) == (self.device.uuid, self.device.index)]
        return meant[0] if meant else None

    @property
    def acting(self) -> tuple[Step, ...]:
        """The optimizers that do something here. A placement always counts: it says where the weights are."""
        from engine import optimizers

        idle = {n.optimizer for n in self.notes if n.kind == "no_effect"}
        return tuple(s for s in self.optimizers if s.name not in idle or optimizers.spec(s.name).is_placement)

    @property
    def is_fixed(self) -> bool:
        """Whether exactly these optimizers are meant (a list of the user's own, or a lock): nothing else is tried."""
        return self.locked or self.request.exact

    @property
    def torch_device(self) -> str:
        """The torch device the plan runs on: "cuda" or "cpu"."""
        return "cpu" if self.device is None else "cuda"

    def explain(self) -> str:
        """Return the plan for reading: what was chosen, what it will do, and why nothing else was."""
        from engine import explain

        return explain.plan_text(self)

    def lock(self, path: str | os.PathLike[str]) -> Lock:
        """Write the plan as a lock (YAML or JSON, by the file's name), and return it. `engine.read_lock` reads it.

        Raises: FileError, UsageError; NothingFitsError and IncompatibleError, for a plan that cannot be run as it is.
        """
        from engine import lockfile

        return lockfile.write(self, path)

    # The four doors to the torch edge. Everything else about a plan is plain data.

    def load(self) -> Any:
        """Return the model's pipeline, loaded as planned, with every optimizer applied and verified.

        Raises: ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError.
        """
        from engine.run import load

        return load.load(self)

    def apply(self, pipe: Any) -> Any:
        """Return `pipe`, a pipeline that the caller has loaded, with every optimizer applied and verified.

        Where this was done before it is only verified again.

        Raises: IncompatibleError, when a step that acts while loading is not already true of it, its components are
            others than were planned, or something was done to it that the plan does not say.
        """
        from engine.run import load

        return load.apply(self, pipe)

    def undo(self, pipe: Any) -> None:
        """Take back what `load` or `apply` of this plan did to `pipe`, the last step first.

        Raises: IncompatibleError, when it was not applied to `pipe`; and, before anything is touched, when a step
            cannot be taken back (`layerwise_casting`, `group_offload`).
        """
        from engine.run import load

        load.undo(self, pipe)

    def run(
        self,
        prompts: str | Prompt | Mapping[str, Any] | Iterable[str | Prompt | Mapping[str, Any]],
        *,
        seed: int | None = None,
        num_images: int | None = None,
        image: Any = None,
    ) -> Iterator[Image | Video]:
        """Load, and yield the pictures or videos of each prompt in turn; each carries its seed and prompt in `.info`.

        A prompt is a text, or an object with `prompt` and, where they differ from the run's, `negative_prompt`, `seed`
        and `num_images`: how many of it are made, by default as many as the plan's batch. `image`
        is the picture to begin with, as a path or an image of PIL, where the plan was made with one: it keeps its size.

        Raises: UsageError, ModelError, HardwareError, IncompatibleError, OutOfMemoryError, NothingFitsError; FileError,
            for an image that is none.
        """
        from engine.run import generate

        return generate.run(self, prompts, seed=seed, num_images=num_images, image=image)


def digest(request: Request, profile: ProfileRef | None, steps: tuple[Step, ...]) -> str:
    """Return the SHA-256 of what would be run: model, revision, request, profile and optimizers, not what was seen."""
    asked = {k: v for k, v in plain(request).items() if k not in _SEEN}
    if request.loras:  # by what is in them, wherever they lie
        asked["loras"] = [{"sha256": lora.sha256, "weight": lora.weight} for lora in request.loras]
    else:  # digests are what they were before there were LoRAs
        del asked["loras"]
    named = None if profile is None else {"name": profile.name, "version": profile.version}
    content = {"request": asked, "profile": named, "optimizers": [plain(s) for s in steps]}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def build(kind: Any, value: Any) -> Any:
    """Return a frozen value of type `kind` from its JSON form, which the schema has already been held against."""
    origin = typing.get_origin(kind)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return build(next(a for a in typing.get_args(kind) if a is not types.NoneType), value)
    if origin is tuple:
        return tuple(build(typing.get_args(kind)[0], v) for v in value)
    if kind is Step:
        params = {k: tuple(v) if isinstance(v, list) else v for k, v in value["params"].items()}
        return Step(name=value["name"], params=FrozenDict(params))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast(Any, kind)(**{k: build(hints[k], v) for k, v in value.items()})
    return FrozenDict(value) if isinstance(value, dict) else value
