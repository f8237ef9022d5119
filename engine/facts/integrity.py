"""Whether a model's folder is whole: every component there, every weight file as long as its own header says.

Reads headers only (8 bytes, then a little JSON), so it costs milliseconds for any size, and finds a download that was
cut off before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from engine.errors import ModelError
from engine.facts import weights
from engine.facts.directory import MAX_INDEX_BYTES, read_json
from engine.facts.model import WITHOUT_WEIGHTS, Model


def check(model: Model, absent: Collection[str] = (), variant: str | None = None) -> None:
    """Return when a model's folder can be loaded. Raises: ModelError, naming what is missing or cut off.

    Components in `absent` are not looked at; of the others the set of weights `variant`, where they have it.
    """
    folder = model.path
    if folder is None:
        return
    for name, component in model.components.items():
        if name in absent:
            continue
        place = folder / name
        if not place.is_dir():
            raise _incomplete(model, f"the folder of its component {name!r} ({component.cls}) is missing")
        if not component.cls.endswith(WITHOUT_WEIGHTS):
            _check_weights(model, place, component.library, variant)


def variant(model: Model, dtype: str, absent: Collection[str] = ()) -> str | None:
    """Return which set of weights in a model's folder is loaded in `dtype`; None is the plain one."""
    if model.path is None:
        return None
    places = [model.path / n for n, c in model.components.items() if n not in absent]
    return weights.variant(({f.name for f in place.glob("*")} for place in places), dtype)


def _incomplete(model: Model, why: str) -> ModelError:
    return ModelError(
        f"the model {model.id} is incomplete",
        why,
        "the download was cut off, or files were moved: download the model again",
    )


def _check_weights(model: Model, place: Path, library: str, variant: str | None) -> None:
    present = [f.name for f in place.glob("*")]
    names = weights.loaded(present, variant, library)
    if not names:
        variant, names = None, weights.loaded(present, None, library)
    indices = [place / n for n in present if weights.is_index(n, variant)]
    if library == "transformers" and names and "-of-" not in names[0]:
        indices = []  # of a whole file the index beside it is not read
    files = [place / n for n in names if n.endswith(".safetensors")] or sorted(place.glob("*.safetensors"))
    wanted = {str(s) for i in indices for s in _weight_map(i, model).values()}
    missing = sorted(w for w in wanted if not (place / Path(w).name).is_file())
    if missing:
        raise _incomplete(
            model, f"{place.name} lacks {len(missing)} of {len(wanted)} weight files, such as {missing[0]}"
        )
    if not files:
        pickled = [f.name for f in (*place.glob("*.bin"), *place.glob("*.pt"), *place.glob("*.ckpt"))]
        if pickled:
            raise ModelError(
                f"the weights of {model.id} are not in safetensors",
                f"{place.name} holds {pickled[0]}, a pickle, which can run code when it is loaded",
                "get the model in safetensors, or convert it where you trust it",
            )
        raise _incomplete(model, f"{place.name} holds no weights")
    for file in files:
        if why := damage(file):
            raise _incomplete(model, f"{place.name}/{file.name} {why}")


def damage(file: Path) -> str | None:
    """Return what is wrong with a safetensors file's length or header, or None. Raises: ModelError, if unreadable."""
    try:
        start, entries = weights.header(file)
        size = file.stat().st_size
    except OSError as error:
        raise ModelError(f"{file} cannot be read", str(error.strerror or error), "check who may read it") from None
    except weights.Damaged as damaged:
        return str(damaged)
    wanted = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return None if size == wanted else f"has {size:,} bytes where its header says {wanted:,}"


def _weight_map(file: Path, model: Model) -> Mapping[str, object]:
    found = read_json(file, model.id, most=MAX_INDEX_BYTES).get("weight_map", {})
    if not isinstance(found, Mapping):
        raise _incomplete(model, f"{file.parent.name}/{file.name} names no weight files")
    return found
