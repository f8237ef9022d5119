"""What was measured of one card (`dg-run calibrate`): a value, kept by the card's UUID, true for one set of versions.

A calibration holds what was measured and nothing that was concluded: what a figure means for a plan is decided where
it is used. A card whose driver or libraries changed since has none: it is left where it is, and the plan says so.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from engine import files, paths, validation, versions
from engine.documents import Document, DocumentError, Problem, read_text
from engine.errors import FileError
from engine.values import Driver, FrozenDict, Gpu
from engine.words import listing

SCHEMA = "dg-run/calibration@1"
AGAIN = "run `dg-run calibrate`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product of two square matrices: the rate that was reached, and how large they were."""

    flop_per_s: float
    side: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """A convolution of one planar square picture, 3 x 3, that keeps its size."""

    dtype: str
    channels_in: int
    channels_out: int
    side_px: int
    seconds: float
    workspace_bytes: int
    """What was taken while it ran, beside its input and its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one card does on its host. A figure that is None was not measured, and `missing` says why."""

    schema: str = SCHEMA
    uuid: str
    name: str
    driver: str | None
    versions: Mapping[str, str | None]
    """Of torch, and of the CUDA and cuDNN beside it."""
    when: str
    took_seconds: float
    disturbed: bool = False
    """Whether another program computed on the card meanwhile, as far as could be seen."""
    multiprocessors: int | None = None
    context_bytes: int | None = None
    """What the process took on the card beside tensors, after it had computed a little of everything."""
    pinned_to_device_bytes_per_s: float | None = None
    pinned_to_host_bytes_per_s: float | None = None
    pageable_to_device_bytes_per_s: float | None = None
    pageable_to_host_bytes_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    """Read and written, within the card."""
    launch_seconds: float | None = None
    """What the host takes to start one operator."""
    fetch_seconds: float | None = None
    """What a tensor costs under sequential offload, beside its bytes."""
    products: Mapping[str, Product] = field(default_factory=FrozenDict)
    """By dtype."""
    attention_flop_per_s: Mapping[str, float] = field(default_factory=FrozenDict)
    """By the width of a head, in the card's half precision."""
    convolutions: tuple[Convolution, ...] = ()
    missing: Mapping[str, str] = field(default_factory=FrozenDict)

    @property
    def digest(self) -> str:
        """Return what tells this calibration from every other, in short."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Return it as JSON, which `schema/calibration.schema.json` describes."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The calibration of a card, or None; `dropped` says why one that is there is not used."""

    calibration: Calibration | None = None
    dropped: str | None = None


NOTHING = Found()


def folder() -> Path:
    """Return where calibrations are kept."""
    return paths.state_dir() / "calibrations"


def path(uuid: str) -> Path:
    """Return where a card's calibration is, or would be."""
    return folder() / f"{file_stem(uuid)}.json"


def file_stem(uuid: str) -> str:
    """Return a UUID as the name of a file: instances of some drivers have slashes in theirs."""
    return re.sub(r"[^A-Za-z0-9-]", "_", uuid)[:120]


def find(card: Gpu | None, driver: Driver | None) -> Found:
    """Return the calibration of a card under today's driver and libraries. A card without a UUID, an imagined one say,
    has none. Never raises: a file that cannot be used is a reason."""
    if card is None or card.uuid is None:
        return NOTHING
    where = path(card.uuid)
    try:
        found = _read_once(where, files.stamp(where))
    except FileNotFoundError:
        return NOTHING
    except OSError as error:
        return Found(dropped=f"the calibration of {card.name} cannot be read ({error.strerror or error}); {AGAIN}")
    except DocumentError as error:
        because = error.problems[0].what
        return Found(dropped=f"the calibration of {card.name} is damaged and ignored ({because}); {AGAIN}")
    if found.uuid != card.uuid:
        return Found(dropped=f"the calibration under the name of {card.name} is another card's, and ignored; {AGAIN}")
    changes = _changes(found, driver)
    if changes:
        told = listing(f"{name} changed from {was or 'none'} to {now or 'none'}" for name, was, now in changes)
        return Found(dropped=f"the calibration of {card.name} of {found.when[:10]} was dropped: {told}; {AGAIN}")
    return Found(calibration=found)


def _changes(found: Calibration, driver: Driver | None) -> list[tuple[str, str | None, str | None]]:
    """Return (what, as it was, as it is) for all that changed since a calibration."""
    now = {"driver": None if driver is None else driver.version, **versions.of_gpu()}
    was = {"driver": found.driver, **found.versions}
    return [(name, was.get(name), now.get(name)) for name in now if was.get(name) != now.get(name)]


@functools.lru_cache(maxsize=8)
def _read_once(where: Path, stamp: tuple[int, int, int]) -> Calibration:
    return read(where)


def read(where: Path) -> Calibration:
    """Return the calibration in a file. Raises: OSError, DocumentError."""
    text = read_text(where)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DocumentError(str(where), text, [Problem(None, f"this is not JSON: {error}")]) from None
    validation.check_once(Document(str(where), text, value, {}, {}), "calibration")
    return _calibration(value)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _calibration(value: Mapping[str, Any]) -> Calibration:
    """Return the value of a document that has been held against the schema."""
    return Calibration(
        **{k: v for k, v in value.items() if k not in _PARTS},
        versions=FrozenDict(value["versions"]),
        products=FrozenDict({k: Product(**v) for k, v in value["products"].items()}),
        attention_flop_per_s=FrozenDict(value["attention_flop_per_s"]),
        convolutions=tuple(Convolution(**c) for c in value["convolutions"]),
        missing=FrozenDict(value["missing"]),
    )


_PARTS = ("versions", "products", "attention_flop_per_s", "convolutions", "missing")


def keep(made: Calibration) -> Path:
    """Write a calibration, whole or not at all, in the place of an older one. Raises: FileError."""
    where = path(made.uuid)
    try:
        files.write(where, made.to_json().encode())
    except OSError as error:
        raise FileError(
            f"the calibration cannot be kept in {where.parent}",
            str(error.strerror or error),
            "make the folder writable, or name another with DG_RUN_STATE",
        ) from None
    return where
