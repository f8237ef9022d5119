"""What weight files say of themselves: their headers, the precision they hold, the variants that lie beside them.

Only headers are read, which are 8 bytes of length and then JSON, so a file of any size costs a millisecond.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError

# FLUX.2's 60 GB have headers of 100 kB; safetensors itself refuses more than 100 MB, whose JSON would take gigabytes.
MAX_HEADER_BYTES = 16 * 1024**2
# A component of DeepSeek's size has 163 of them.
MAX_FILES = 1_000

# As safetensors writes them. Token positions and masks tell nothing of the precision; bytes and nibbles are quantized.
_TELLS_NOTHING = frozenset({"I64", "I32", "BOOL"})
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_CONFIGURED = frozenset(_FLOATS.values())
# diffusers writes NAME.VARIANT-00001-of-00002.safetensors; older releases NAME-00001-of-00002.VARIANT.safetensors.
_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<new>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>\w+))?"
    r"\.safetensors\Z"
)
_INDEX = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<new>\w+))?\.safetensors\.index(?:\.(?P<old>\w+))?\.json\Z"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How files of weights end that can run code when they are loaded."""
_LFS_POINTER = b"version https://git-lfs"


class Damaged(ValueError):
    """A weight file whose header does not hold; the message goes on after the file's name."""


class Pointer(Damaged):
    """Not weights, but what git leaves in their place."""


def header(file: Path) -> tuple[int, Mapping[str, Any]]:
    """Return (bytes before the tensors, entries by tensor) of a safetensors file. Raises: Damaged, OSError."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == _LFS_POINTER[:8] and stream.read(len(_LFS_POINTER) - 8) == _LFS_POINTER[8:]:
            raise Pointer("is a git-lfs pointer and not the weights: run `git lfs pull`")
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise Damaged("is cut off within its header")
        if length > MAX_HEADER_BYTES:
            raise Damaged(f"has a header of {length:,} bytes, and no model's is larger than {MAX_HEADER_BYTES:,}")
        stream.seek(8)
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for entry in entries.values():
            first, last = entry["data_offsets"]
            if not isinstance(entry["dtype"], str) or not 0 <= first <= last:
                raise Damaged("has a damaged header")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged("has a damaged header") from None
    return 8 + length, entries


def loaded(names: Iterable[str], variant: str | None, library: str) -> tuple[str, ...]:
    """Return the files of weights (with their index) that a library loads of those in a component's folder; () if none.

    `variant` is the set of weights, None the plain one. Where a set is there both whole and in shards, diffusers goes
    by the index and transformers by the whole file (diffusers 0.42, transformers 5.23: `from_pretrained`).
    """
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    names = sorted(names, key=lambda name: (not name.startswith(stem), name))
    own = [n for n in names if (m := _FILE.match(n)) and (m["new"] or m["old"]) == variant]
    index = [n for n in names if is_index(n, variant)]
    shards = [n for n in own if "-of-" in n]
    whole = [n for n in own if "-of-" not in n]
    if index and shards and (library == "diffusers" or not whole):
        return (*shards, index[0])
    return tuple(whole[:1] or shards)


def is_index(name: str, variant: str | None) -> bool:
    """Return whether a file is the list of the shards of a set of weights."""
    match = _INDEX.match(name)
    return match is not None and (match["new"] or match["old"]) == variant


def variant(folders: Iterable[Collection[str]], dtype: str) -> str | None:
    """Return the set of weights to load, by the names of the files in the components' folders; None is the plain one.

    "fp16" is taken for float16 alone, where it is what the plain weights would become; and where it is all there is.
    """
    sets = [{s: bool(loaded(names, s, "diffusers")) for s in (None, "fp16")} for names in folders]
    if any(one["fp16"] and (dtype == "float16" or not one[None]) for one in sets):
        return "fp16"
    return None


def _by_variant(folder: Path) -> dict[str, list[Path]]:
    """Return a component's weight files by variant; "" is the one that is loaded unless another is asked for."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if (match := _FILE.match(file.name)) and file.is_file():
            found.setdefault(match["new"] or match["old"] or "", []).append(file)
    return found


def seen(folder: Path, model: str) -> tuple[str | None, tuple[str, ...]]:
    """Return (dtype, variants) of the weights in a component's folder.

    The dtype is None where there are no weights, or they hold more than one. Raises: ModelError, when a header is
    damaged or absurd.
    """
    try:
        files = _by_variant(folder)
        variants = tuple(sorted(v for v in files if v))
        if len(files.get("", ())) > MAX_FILES:
            raise ModelError(
                f"{model}: {folder.name} is not a model's component",
                f"it has {len(files['']):,} weight files",
                "give the directory of a model in diffusers layout",
            )
        dtypes = set()
        for file in files.get("", ()):
            try:
                dtypes |= {entry["dtype"] for entry in header(file)[1].values()}
            except Pointer:  # the configuration is here and the weights are not: enough to plan with
                return None, variants
            except Damaged as damage:
                raise ModelError(
                    f"the model {model} is incomplete",
                    f"{folder.name}/{file.name} {damage}",
                    "the download was cut off, or the file is no weight file: download the model again",
                ) from None
    except OSError as error:
        raise ModelError(
            f"{model}: {folder.name} cannot be read",
            str(error.strerror or error),
            "check who may read the model's directory",
        ) from None
    telling = dtypes - _TELLS_NOTHING
    return (_FLOATS.get(telling.pop()) if len(telling) == 1 else None), variants


def configured(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that a configuration says its weights have, or None."""
    said = config.get("dtype", config.get("torch_dtype"))
    name = said.removeprefix("torch.") if isinstance(said, str) else None
    return name if name in _CONFIGURED else None
