"""Fuse LoRAs into the weights of a component as it is loaded, and see that they are in.

What a LoRA adds to a layer's weight is one small matrix times another. That is computed here, in float32 and in bands
of rows, and added once for all LoRAs together, so that each weight is rounded once; nothing stands beside the weights
meanwhile or after. The files' many spellings are read by the pipeline's own class (`lora_state_dict`, diffusers 0.42,
`loaders/lora_pipeline.py`), and everything is held against weightless twins before a byte of the model is loaded.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.facts import loras
from engine.facts.model import Model
from engine.optimizers.spec import NotApplied
from engine.run.parts import Change
from engine.values import Lora, Request
from engine.words import listing

_BAND_BYTES = 8 * 1024**2
"""What is computed of a weight at a time, in float32."""
_OLD = re.compile(r"\.to_(q|k|v|out)_lora\.")
_OF_FLUX = re.compile(
    r"diffusion_model\.(?P<path>(?:double|single)_blocks\..+)\.(?:lora_(?P<side>A|B|down|up)\.weight|alpha)\Z"
)
_OF_A_LAYER = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight\Z")


@dataclass(frozen=True, slots=True)
class Added:
    """What one LoRA adds to one layer: `scale` times `up` @ `down`."""

    up: Any
    down: Any
    scale: float


def fusing(request: Request, model: Model, twins: Mapping[str, Any]) -> Change | None:
    """Return what fuses a request's LoRAs into components; None without any.

    Raises: ModelError, for one that is not the model's; FileError, for one that is not what was planned.
    """
    if not request.loras:
        return None
    by_component: dict[str, dict[str, list[Added]]] = {}
    for lora in request.loras:
        for name, layers in _read(lora, model, twins, request.pipeline_class or model.pipeline_class).items():
            for path, added in layers.items():
                by_component.setdefault(name, {}).setdefault(path, []).append(added)

    def change(name: str, module: Any) -> str | None:
        layers = by_component.get(name)
        return None if layers is None else _fused(name, module, layers)

    return change


def _read(lora: Lora, model: Model, twins: Mapping[str, Any], pipeline_class: str) -> dict[str, dict[str, Added]]:
    """Return what a LoRA adds, by component and layer."""
    import torch

    file = loras.unchanged(lora)
    state, alphas, metadata = _state(file, model, twins, pipeline_class)
    found: dict[str, dict[str, Added]] = {}
    taken = 0
    for name, twin in twins.items():
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        taken += len(own)
        if own:
            of_it = _of(metadata, name)
            scales = _Scales(of_it, _of(alphas, name))
            found[name] = _layers(_spelt(own, twin), twin, scales, lora, model, pipeline_class)
    if left := len(state) - taken:
        key = next(k for k in state if not k.startswith(tuple(f"{n}." for n in twins)))
        if not found:
            raise _foreign(lora, file, model, pipeline_class, f"the model has no component for {key[:80]!r}")
        raise ModelError(
            f"the LoRA {lora.path} does not wholly act on {model.id}",
            f"{left} of its {len(state)} weights are for no component that is loaded, such as {key[:80]!r}",
            "load the component too, or take another LoRA",
        )
    for layers in found.values():
        for path, added in layers.items():
            if not (torch.isfinite(added.up).all() and torch.isfinite(added.down).all()):
                raise ModelError(
                    f"the LoRA {lora.path} holds what is no number", f"in {path}", "download it again, or take another"
                )
    return found


def _state(file: Path, model: Model, twins: Mapping[str, Any], pipeline_class: str) -> tuple[Any, Any, Any]:
    """Return (weights, alphas, metadata) of a LoRA's file in the spelling of diffusers. Raises: ModelError."""
    import diffusers
    from diffusers.loaders import FluxLoraLoaderMixin
    from safetensors import SafetensorError

    loader: Any = getattr(diffusers, pipeline_class, None)
    read = getattr(loader, "lora_state_dict", None)
    if read is None:
        raise ModelError(
            f"{pipeline_class} takes no LoRA", f"diffusers {diffusers.__version__} has none for it", "leave --lora out"
        )
    more: dict[str, Any] = {"return_lora_metadata": True}
    if "return_alphas" in inspect.signature(read).parameters:
        more["return_alphas"] = True
    if "unet" in twins:
        more["unet_config"] = twins["unet"].config
    try:
        # Other models have layers of those names too, and readers of their own.
        renamed = _as_kohyas(file) if issubclass(loader, FluxLoraLoaderMixin) else None
        given = renamed or str(file.parent)
        state, *rest = read(given, weight_name=file.name, use_safetensors=True, local_files_only=True, **more)
    except (
        *(ValueError, LookupError, AssertionError, RuntimeError, AttributeError, TypeError, OSError),
        SafetensorError,
    ) as error:
        said = " ".join(str(error).split())[:200] or f"diffusers does not know its layers ({type(error).__name__})"
        raise loras.foreign(str(file), model.id, pipeline_class, loras.made_for(loras.checked(file)), said) from error
    return state, rest[0] if len(rest) == 2 else None, rest[-1]


def _as_kohyas(file: Path) -> dict[str, Any] | None:
    """Return a LoRA of FLUX in ComfyUI's spelling as kohya spells it, which diffusers 0.42 reads; None for others."""
    from safetensors.torch import load_file

    found = {key: _OF_FLUX.match(key) for key in loras.checked(file)}
    if not all(found.values()):
        return None
    sides = {"A": ".lora_down.weight", "B": ".lora_up.weight", "down": ".lora_down.weight", "up": ".lora_up.weight"}
    return {
        f"lora_unet_{match['path'].replace('.', '_')}{sides.get(match['side'], '.alpha')}": value
        for key, value in load_file(file).items()
        if (match := found[key]) is not None
    }


def _of(values: Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    return {k.removeprefix(f"{name}."): v for k, v in (values or {}).items() if k.startswith(f"{name}.")}


def _spelt(state: dict[str, Any], twin: Any) -> dict[str, Any]:
    """Return a component's part of a LoRA with layers called `….lora_A.weight` and `….lora_B.weight`, where known."""
    from diffusers.utils import state_dict_utils as spelling
    from transformers import PreTrainedModel

    is_text = isinstance(twin, PreTrainedModel)
    if not all(map(_OF_A_LAYER.match, state)):
        if not is_text:
            state = spelling.convert_unet_state_dict_to_peft(state)
        elif any(map(_OLD.search, state)):
            # Left to itself it knows this spelling by `to_out_lora` alone, and would not take a file without it.
            state = spelling.convert_state_dict_to_peft(state, spelling.StateDictType.DIFFUSERS_OLD)
        elif any("lora_linear_layer" in key for key in state):
            state = spelling.convert_state_dict_to_peft(state)
    if is_text and not hasattr(twin, "text_model"):  # flattened in transformers 5
        state = {k.removeprefix("text_model."): v for k, v in state.items()}
    return state


class _Scales:
    """By what each layer's product is multiplied: alpha over rank, where the file says an alpha; else 1."""

    def __init__(self, metadata: Mapping[str, Any], alphas: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self._own = {self._layer(k): float(v) for k, v in alphas.items()}
        self._usual = Counter(self._own.values()).most_common(1)[0][0] if self._own else None

    @staticmethod
    def _layer(key: str) -> str:
        key = key.partition(".lora_A.")[0].removesuffix(".alpha")
        return key.partition(".lora_linear_layer")[0].partition(".down.")[0]

    def of(self, path: str, rank: int) -> float:
        if self._metadata:
            patterns: Mapping[str, Any] = self._metadata.get("alpha_pattern") or {}
            fitting = (a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})\Z", path))
            alpha = float(next(fitting, self._metadata.get("lora_alpha", rank)))
            return alpha / math.sqrt(rank) if self._metadata.get("use_rslora") else alpha / rank
        own = self._own.get(path, self._usual)
        return 1.0 if own is None else own / rank


def _layers(
    state: Mapping[str, Any], twin: Any, scales: _Scales, lora: Lora, model: Model, pipeline_class: str
) -> dict[str, Added]:
    """Return what is added to each layer of one component. Raises: ModelError, where the layers are not its own."""
    sides: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        match = _OF_A_LAYER.match(key)
        if match is None:
            raise ModelError(
                f"the LoRA {lora.path} is of a kind that is not fused here",
                f"beside what is added to weights it has {key[:80]!r}",
                "take a plain LoRA, or load the pipeline yourself and fuse it before plan.apply",
            )
        sides.setdefault(match["path"], {})[match["side"]] = value
    found = {}
    for path, pair in sides.items():
        wrong = _unlike(twin, path, pair)
        if wrong:
            raise _foreign(lora, loras.located(lora.path), model, pipeline_class, wrong)
        rank = pair["A"].shape[0]
        found[path] = Added(pair["B"].flatten(1), pair["A"].flatten(1), lora.weight * scales.of(path, rank))
    return found


def _unlike(twin: Any, path: str, pair: Mapping[str, Any]) -> str:
    """Return why a layer of a LoRA is not one of a component's; "" where it is."""
    try:
        weight = twin.get_submodule(path).weight
    except AttributeError:
        return f"the model has no layer {path}"
    if set(pair) != {"A", "B"}:
        return f"of its layer {path} one half is missing"
    down, up = tuple(pair["A"].shape), tuple(pair["B"].shape)
    shape = tuple(weight.shape)
    fits = len(down) == len(shape) == len(up) and len(shape) in (2, 4) and down[0] == up[1] and up[0] == shape[0]
    if not fits or down[1:] != shape[1:] or any(size != 1 for size in up[2:]):
        return f"its layer {path} is for a weight of {up[:1] + down[1:]}, and the model's is {shape}"
    return ""


def _foreign(lora: Lora, file: Path, model: Model, pipeline_class: str, because: str) -> ModelError:
    return loras.foreign(lora.path, model.id, pipeline_class, loras.made_for(loras.checked(file)), because)


def _fused(name: str, module: Any, layers: Mapping[str, list[Added]]) -> str:
    """Fuse into one component, and see that it is in. Raises: NotApplied."""
    import torch

    sample = max(layers, key=lambda path: module.get_submodule(path).weight.numel())
    seen = module.get_submodule(sample).weight.detach()
    rows = min(64, seen.shape[0])
    before = seen[:rows].clone()
    with torch.no_grad():
        for path, all_added in layers.items():
            _add(module.get_submodule(path).weight, all_added)
    _see(name, module, sample, before, layers[sample])
    return f"lora: fused into {len(layers)} layers of {name}, and nothing is left beside them"


def _add(weight: Any, all_added: list[Added]) -> None:
    flat = weight.data.view(weight.shape[0], -1)
    for rows in _bands(flat):
        fused = flat[rows].float()
        for added in all_added:
            fused.addmm_(added.up[rows].float(), added.down.float(), alpha=added.scale)
        flat[rows].copy_(fused)


def _bands(flat: Any) -> Iterator[slice]:
    count = max(1, _BAND_BYTES // (4 * flat.shape[1]))
    yield from (slice(begin, begin + count) for begin in range(0, flat.shape[0], count))


def _see(name: str, module: Any, path: str, before: Any, all_added: list[Added]) -> None:
    """See that a layer's first rows are what they were and what is added. Computed anew, in float64."""
    import torch

    rows = before.shape[0]
    now = module.get_submodule(path).weight.detach()[:rows].reshape(rows, -1).double()
    wanted = before.reshape(rows, -1).double()
    for added in all_added:
        wanted = wanted + added.scale * (added.up[:rows].double() @ added.down.double())
    step = torch.finfo(before.dtype).eps
    if not torch.allclose(now, wanted, rtol=2 * step, atol=2 * step * float(wanted.abs().max())):
        worst = float((now - wanted).abs().max())
        raise NotApplied("lora", f"{name}.{path} is {worst:.3g} from its weight and what the LoRA adds")
    left = [n for n, m in module.named_modules() if hasattr(m, "lora_A") or hasattr(m, "base_layer")]
    if left or getattr(module, "peft_config", None):
        raise NotApplied("lora", f"{name} has adapters beside its weights: {listing(left[:3])}")
