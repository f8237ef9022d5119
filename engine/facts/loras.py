"""A LoRA's file, by its header alone: whether it is one, what it acts on, and what it seems to be for. No torch.

A LoRA is part of the request and not a step of the list: it is fused into the weights as each component is loaded,
before any optimizer sees them, and nothing of it is left beside them. So no order can be wrong, and no optimizer's
bytes or seconds change but the host's, whose pages of a file become memory of its own where they are written to.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import paths
from engine.errors import FileError, ModelError, UsageError
from engine.facts import attention, hub, weights
from engine.facts.casting import is_text_encoder
from engine.facts.model import Model
from engine.values import Lora
from engine.words import listing

MOST_WEIGHT = 10.0
"""Beyond it a LoRA is noise: those that are published are used from -2 to 2."""
MAX_BYTES = 8 * 1024**3
MAX_LORAS = 16
_USUAL = "pytorch_lora_weights.safetensors"
_WEIGHT = re.compile(r"(?P<path>.*):(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|[-+]?inf)\Z", re.S)
_ON_THE_HUB = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<file>/(?!.*\.\.)[\w./ -]+\.safetensors)?\Z", re.ASCII
)
_ACTS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora.up", "lora.down", "lora_linear_layer", "_lora1.", "_lora2.")
_DOWN = ("lora_A", "lora_down", "lora.down")
_OTHER_KINDS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT"}
_TEXT = ("text_encoder", "lora_te", "te_", "te1_", "te2_")
_DO = "give a LoRA in safetensors: --lora FILE.safetensors[:WEIGHT]"

# What the names of a LoRA's layers tell of the model it was made for, the first that is found.
_MADE_FOR = (
    (("single_transformer_blocks", "single_blocks"), "a FLUX model"),
    (("cross_attn", "blocks_0_self_attn"), "a Wan model"),
    (("caption_projection", "adaln_single"), "a PixArt model"),
    (("joint_blocks", "add_q_proj", "add_k_proj"), "a model with a joint transformer, as Stable Diffusion 3"),
    (("down_blocks", "input_blocks", "mid_block", "up_blocks"), "a model with a UNet"),
)
_UNETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}

LoraLike = str | os.PathLike[str] | Lora | tuple[Any, Any] | Mapping[str, Any]


def asked(given: LoraLike) -> tuple[str, float]:
    """Return (where, weight) of "PATH[:weight]", a path, (path, weight) or {"path": …, "weight": …}.

    Raises: UsageError, for a weight that cannot be meant.
    """
    weight: Any = 1.0
    if isinstance(given, Lora):
        place, weight = given.path, given.weight
    elif isinstance(given, Mapping) and "path" in given and set(given) <= {"path", "weight"}:
        place, weight = os.fspath(given["path"]), given.get("weight", 1.0)
    elif isinstance(given, tuple) and len(given) == 2:
        place, weight = os.fspath(given[0]), given[1]
    elif isinstance(given, str) and (match := _WEIGHT.match(given)) and not Path(given).exists():
        place, weight = match["path"], float(match["weight"])
    elif isinstance(given, str | os.PathLike):
        place = os.fspath(given)
    else:
        raise UsageError(f"{given!r} is not a LoRA", do='write "PATH", "PATH:0.8" or ("PATH", 0.8)')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"a LoRA's weight cannot be {weight!r}", "it is not a number", "give one such as 0.8")
    if abs(weight) > MOST_WEIGHT or weight == 0:
        why = "it would do nothing" if weight == 0 else f"beyond {MOST_WEIGHT:g} nothing is left of the model itself"
        raise UsageError(f"a LoRA's weight cannot be {weight:g}", why, "give one such as 0.8, or leave the LoRA out")
    if not str(place).strip():
        raise UsageError("a LoRA's path is empty", do=_DO)
    return str(place), float(weight)


def read(given: Iterable[LoraLike], model: Model) -> tuple[Lora, ...]:
    """Return LoRAs as a request holds them: looked at, and known by what is in them.

    Raises: UsageError, FileError; ModelError, for one that cannot be the model's, or comes from the hub and does not.
    """
    found = []
    for place, weight in map(asked, given):
        file = located(place)
        entries = checked(file)
        components = _acts_on(file, entries, model)
        path = place if _is_on_the_hub(place) else str(file.absolute())
        found.append(Lora(path=path, sha256=digest(file), weight=weight, components=components))
    if len(found) > MAX_LORAS:
        raise UsageError(f"{len(found)} LoRAs were given", f"{MAX_LORAS} are the most", "leave some out")
    return tuple(found)


def unchanged(lora: Lora) -> Path:
    """Return where a request's LoRA lies, if it is still the one that was planned. Raises: FileError, ModelError."""
    file = located(lora.path)
    if (now := digest(file)) != lora.sha256:
        raise FileError(
            f"the LoRA {lora.path} is not the one that was planned",
            f"its content was {lora.sha256[:12]}…, and is {now[:12]}…",
            "put the file back, or plan again",
        )
    return file


def located(place: str) -> Path:
    """Return the file of a LoRA: a file, the one in a folder, or of a repository on the hub, which is fetched.

    Raises: FileError, ModelError.
    """
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            return path / _only([f.name for f in path.glob("*") if f.is_file()], place)
        if path.is_file():
            if path.suffix.lower() in weights.PICKLES:
                raise _pickled(place, path.name)
            return path
    except OSError as error:
        raise FileError(f"the LoRA {place} cannot be read", str(error.strerror or error), _DO) from None
    if match := _ON_THE_HUB.match(place):
        return _fetched(place, match["id"], (match["file"] or "").lstrip("/"))
    raise FileError(f"there is no LoRA {place}", "it is neither a file or folder here nor a name on the hub", _DO)


def _is_on_the_hub(place: str) -> bool:
    return not Path(place).expanduser().exists()


def _only(names: Sequence[str], place: str) -> str:
    """Return the one file of weights among these names. Raises: FileError."""
    found = sorted(n for n in names if n.endswith(".safetensors"))
    if _USUAL in found:
        return _USUAL
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(
            f"{place} holds {len(found)} LoRAs", f"they are {listing(found[:5])}", f"name one: {place}/{found[0]}"
        )
    if pickled := sorted(n for n in names if n.endswith(weights.PICKLES)):
        raise _pickled(place, pickled[0])
    raise FileError(f"{place} holds no LoRA", "there is no .safetensors file in it", _DO)


def _pickled(place: str, name: str) -> FileError:
    return FileError(
        f"the LoRA {place} is not in safetensors", f"{name} is a pickle, which can run code when it is loaded", _DO
    )


def _fetched(place: str, name: str, file: str) -> Path:
    """Return a LoRA's file of the hub, in its cache. Raises: ModelError, FileError."""
    cache = paths.hub_cache_dir()
    if file and (snapshot := _cached(name, file, cache)):
        return snapshot
    if not file and (kept := _snapshot(name, cache)) is not None:
        names = [f.name for f in kept.glob("*.safetensors")]
        if names:
            return kept / _only(names, place)
    if hub.is_offline():
        raise ModelError(
            f"the LoRA {place} is not on this machine",
            "HF_HUB_OFFLINE is set, there is no such file here, and the cache does not hold it",
            "unset HF_HUB_OFFLINE, or give a file",
        )
    from huggingface_hub import HfApi, hf_hub_download

    hub.keep_quiet()
    with hub.telling(name, None, "give a LoRA's file, or OWNER/MODEL[/FILE.safetensors] as it stands on the hub"):
        names = [s.rfilename for s in HfApi().model_info(name, timeout=10).siblings or ()]
        wanted = file or _only(names, place)
        return Path(hf_hub_download(name, wanted, cache_dir=cache))


def _snapshot(name: str, cache: Path) -> Path | None:
    repository = cache / f"models--{name.replace('/', '--')}"
    try:
        found = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="ascii").strip()
        return found if found.is_dir() else None
    except (OSError, UnicodeDecodeError):
        return None


def _cached(name: str, file: str, cache: Path) -> Path | None:
    snapshot = _snapshot(name, cache)
    return snapshot / file if snapshot is not None and (snapshot / file).is_file() else None


def checked(file: Path) -> Mapping[str, Any]:
    """Return the tensors that a LoRA's header names. Raises: FileError, for a file that is none, or damaged."""
    try:
        start, entries = weights.header(file)
        size = file.stat().st_size
    except OSError as error:
        raise FileError(f"the LoRA {file} cannot be read", str(error.strerror or error), _DO) from None
    except weights.Damaged as damage:
        raise FileError(f"the LoRA {file} is damaged, or not in safetensors", f"it {damage}", _DO) from None
    wanted = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != wanted or size > MAX_BYTES:
        why = f"it has {size:,} bytes where its header says {wanted:,}" if size != wanted else f"it has {size:,} bytes"
        raise FileError(f"the LoRA {file} is damaged", why, "download it again")
    if not entries:
        raise FileError(f"the LoRA {file} is empty", "its header names no weights", "download it again")
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in entries):
            raise FileError(
                f"{file} is a {kind}, and not a LoRA that can be fused here",
                "only the plain kind is: what is added to a weight is one matrix times another",
                "take a LoRA, or load the pipeline yourself and fuse it before plan.apply",
            )
    if not any(mark in key for key in entries for mark in _ACTS):
        raise FileError(
            f"{file} is not a LoRA",
            f"none of its {len(entries)} weights is one of a LoRA's; the first is {next(iter(entries))[:80]!r}",
            _DO,
        )
    return entries


def digest(file: Path) -> str:
    """Return the SHA-256 of a file. Raises: FileError."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"the LoRA {file} cannot be read", str(error.strerror or error), _DO) from None


def _acts_on(file: Path, entries: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """Return which of a model's components a LoRA can act on, by its keys alone. Raises: ModelError, when on none.

    Other trainers call the text encoders differently: where they are meant, any of them may be.
    """
    texts = [n for n in model.parts if is_text_encoder(n)] if any(k.startswith(_TEXT) for k in entries) else []
    drawing = [k for k in entries if not k.startswith(_TEXT)]
    of_a_unet = any(mark in k for k in drawing for mark in _MADE_FOR[-1][0])
    denoisers = [n for n in attention.DENOISERS if n in model.components and drawing]
    if drawing and (not denoisers or (of_a_unet and "unet" not in denoisers)):
        raise foreign(str(file), model.id, model.pipeline_class, made_for(entries))
    found = tuple(sorted({*texts, *denoisers}))
    if not found:
        raise foreign(str(file), model.id, model.pipeline_class, made_for(entries))
    return found


def made_for(entries: Mapping[str, Any]) -> str:
    """Return what a LoRA seems to have been made for, by its header."""
    widths = {  # of what a UNet attends to
        entry["shape"][-1]
        for key, entry in entries.items()
        if "attn2" in key and ("to_k" in key or "to_v" in key) and any(m in key for m in _DOWN)
    }
    for marks, name in _MADE_FOR:
        if any(mark in key for key in entries for mark in marks):
            return _UNETS.get(widths.pop() if len(widths) == 1 else 0, name) if name.endswith("UNet") else name
    return "another model"


def foreign(lora: str, model: str, pipeline_class: str, seems: str, because: str = "") -> ModelError:
    """Return what is said of a LoRA for another architecture."""
    return ModelError(
        f"the LoRA {lora} is not for {model}",
        (f"{because}; " if because else "") + f"it seems to be for {seems}, and this is a {pipeline_class}",
        "take a LoRA that was trained on this model",
    )
