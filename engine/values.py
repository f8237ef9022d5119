"""The plain frozen values that pass between the layers. Sizes are bytes, times seconds; None means not known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NoReturn

Scalar = str | int | float | bool | None


class FrozenDict(dict[str, Any]):
    """A dict that is not changed after it is made, so that a frozen value holding it is frozen too."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this mapping is frozen; make a new one")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: a dataclass as a dict of its fields, and so on within it.

    `dataclasses.asdict` copies whatever it comes by, again and again. Here what is in a value twice is once in the
    result (a plan's steps are in hundreds of its rejections): so it is for reading and writing, and not to be changed.
    """
    return _plain(value, {})


def _plain(value: Any, known: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if kind in _BARE:
        return value
    found = known.get(id(value))
    if found is not None:
        return found
    names = _field_names(kind)
    if names is not None:
        found = {n: _plain(getattr(value, n), known) for n in names}
    elif isinstance(value, dict):
        found = {k: _plain(v, known) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        found = [_plain(v, known) for v in value]
    else:
        return value
    known[id(value)] = found
    return found


_BARE = frozenset({str, int, float, bool, type(None)})


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """Return the names of a dataclass's fields; None for any other class."""
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """Somebody else's process on a card; its name is the program's, without the folder."""

    pid: int
    name: str | None
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card, or one MIG instance of a card, at one moment.

    A field that is None is not known, and `unknown` says why. `index` is NVML's (by bus), which is not CUDA's.
    """

    index: int
    name: str
    uuid: str | None
    arch: str | None
    """Compute capability, as "8.9"."""
    total_bytes: int | None
    free_bytes: int | None
    reserved_bytes: int | None = None
    """What the driver and firmware keep for themselves; not part of `used_bytes`."""
    used_bytes: int | None = None
    mig: bool = False
    mig_instance: int | None = None
    hypothetical: bool = False
    unified_memory: bool = False
    """The card shares the host's memory: `total_bytes` and `free_bytes` are then the host's."""
    driver_model: str | None = None
    """On Windows "WDDM" or "TCC"; under WDDM memory beyond the card spills to the host in silence."""
    display_active: bool | None = None
    pcie_generation: int | None = None
    """The highest that card and slot agree on: an idle link reports generation 1."""
    pcie_width: int | None = None
    nvlink_links: int | None = None
    cores: int | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    memory_bus_bits: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=FrozenDict)

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The capability as numbers that compare."""
        if self.arch is None:
            return None
        major, _, minor = self.arch.partition(".")
        return int(major), int(minor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine around the cards; `ram_bytes` is what a new process can still take."""

    ram_bytes: int | None
    total_ram_bytes: int | None
    cores: int | None
    platform: str
    swap_free_bytes: int | None = None
    model_disk_free_bytes: int | None = None
    """On the disk of the Hugging Face cache."""
    output_disk_free_bytes: int | None = None
    """On the disk of the current directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The NVIDIA driver; `cuda` is the newest CUDA version that it runs, as "13.0"."""

    version: str | None
    cuda: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something of the hardware that does not work: of one card, or of the driver as a whole (index None)."""

    index: int | None
    what: str
    why: str
    do: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One snapshot, taken for one decision. `no_gpu_because` says why `gpus` is empty."""

    gpus: tuple[Gpu, ...]
    host: Host
    driver: Driver | None = None
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    no_gpu_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The card a plan is for."""

    uuid: str | None
    index: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer with its parameters."""

    name: str
    params: Mapping[str, Any] = field(default_factory=FrozenDict)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        # A search asks for it thousands of times: it is what runs are told apart by.
        if not self.params:
            return self.name
        if set(self.params) == {"value"}:
            return f"{self.name}: {self.params['value']}"
        return f"{self.name} ({', '.join(f'{k}: {_shown(v)}' for k, v in self.params.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """When a profile may be used: permission, never proof that it fits. Ranges are half-open."""

    device: str | None = None
    free_vram_at_least_bytes: int | None = None
    free_vram_below_bytes: int | None = None
    pixels_at_least: int | None = None
    pixels_below: int | None = None
    gpus: tuple[str, ...] = ()
    """Names of cards, in which `*` stands for anything; () is any card."""
    pipelines: tuple[str, ...] = ()
    """Classes of pipelines, in which `*` stands for anything; () is any pipeline."""


Alternative = tuple[Step, ...]
"""Steps that are applied together; () is nothing at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One place in a profile's list: what may stand there. A step that is always on is the only alternative."""

    alternatives: tuple[Alternative, ...]

    @property
    def always(self) -> Alternative:
        """The steps that are on whatever is chosen here."""
        return self.alternatives[0] if len(self.alternatives) == 1 else ()

    def __str__(self) -> str:
        told = [" + ".join(map(str, a)) or "none" for a in self.alternatives]
        return told[0] if len(told) == 1 else f"one of ({' | '.join(told)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A profile as read from its file, with what it takes over from its parent: a small search space.

    A parameter whose value is "auto" is open, where its optimizer says that it may be.
    """

    name: str
    version: str
    summary: str
    match: Match
    slots: tuple[Slot, ...]
    source: str
    """"built-in", or the path of its file."""
    prefer: str | None = None
    """What it prefers when it is asked for by name; None is what the request prefers."""
    extends: str | None = None
    fallback: str | None = None
    """The profile to go on with, when this one was asked for by name and cannot fit."""
    overridden: tuple[str, ...] = ()
    """What its parent says and it does not, a line each."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The first alternative everywhere: what the profile turns on where nothing speaks against it."""
        return tuple(step for slot in self.slots for step in slot.alternatives[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRef:
    """What a plan keeps of its profile. `source` is "built-in" or the file's path."""

    name: str
    version: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA that is fused into the weights while they are loaded; it is what is in its file, wherever that lies."""

    path: str
    """A file, or OWNER/MODEL[/FILE] on the hub."""
    sha256: str
    """Of the file's content, in hexadecimal."""
    weight: float
    """By what it is multiplied."""
    components: tuple[str, ...]
    """Which of the model's components it can act on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for. A size that is None is left to the pipeline's own default."""

    model: str
    revision: str | None = None
    pipeline_class: str | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: int = 1
    steps: int | None = None
    guidance: float | None = None
    call: Mapping[str, Any] = field(default_factory=FrozenDict)
    components: Mapping[str, None] = field(default_factory=FrozenDict)
    """Components that are left out of the pipeline, by name."""
    loras: tuple[Lora, ...] = ()
    device: str | None = None
    gpu: str | None = None
    vram_bytes: int | None = None
    host_ram_bytes: int | None = None
    headroom_bytes: int | None = None
    profile: str | None = None
    exact: bool = False
    require: tuple[Step, ...] = ()
    forbid: tuple[str, ...] = ()
    quality: str = "near"
    prefer: str = "speed"
    prompts_known: bool = False

    @property
    def pixels(self) -> int | None:
        """Pixels of one picture or frame."""
        return None if self.height is None or self.width is None else self.height * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """Host memory of a run: what must fit, and file pages, which can be dropped."""

    anonymous_bytes: int | None = None
    pinned_bytes: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the truth is meant to lie, nineteen times in twenty; the bytes are of `peak_allocated_bytes`."""

    low_bytes: int | None = None
    high_bytes: int | None = None
    low_seconds: float | None = None
    high_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One stretch of a run: `load`, `encode`, `denoise`, `decode`."""

    name: str
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    activation_bytes: int | None = None
    workspace_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take. A field that is None is not known, and nothing stands in for it."""

    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    required_bytes: int | None = None
    host: HostBytes = HostBytes()
    host_bytes: int | None = None
    seconds: float | None = None
    load_seconds: float | None = None
    quality: str | None = None
    basis: str | None = None
    calibrated: bool = False
    interval: Interval = Interval()
    phases: tuple[Phase, ...] = ()
    assumptions: tuple[str, ...] = ()
    """What the dry run took as given, or could not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A profile that was not chosen, and why: the rule that broke, and how many bytes short it was."""

    profile: str
    optimizers: tuple[Step, ...]
    rule: str
    short_bytes: int | None
    because: str
    remedy: str
    seconds: float | None = None
    """What it would take, or take at the least; None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change to the request or the machine, and the plan that it would allow: computed, not guessed."""

    kind: str
    """"vram", "host_ram", "both", "size", "batch", "frames", "quality" or "forbid"."""
    change: str
    """What to change, in words."""
    more_bytes: int | None
    """How much more memory it is, where it is memory; of `both` what is more of the card's."""
    profile: str | None
    optimizers: tuple[Step, ...]
    required_bytes: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """What a run goes down to when its memory runs out: solved for, on the same card, and needing less of it."""

    profile: ProfileRef | None
    optimizers: tuple[Step, ...]
    required_bytes: int | None
    seconds: float | None
    quality: str | None
    fits: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Something a person should know before the run, about one optimizer (or None for the plan as a whole)."""

    kind: str
    optimizer: str | None
    because: str
