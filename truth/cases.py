"""What is executed and predicted: a small pipeline, the sizes of a call, a list of optimizers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engine import compat, optimizers
from engine.errors import IncompatibleError
from engine.optimizers.spec import Context
from engine.values import FrozenDict, Step
from truth import pipelines

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: `architecture` is a name of `pipelines.ALL`, `call` replaces arguments of its usual call."""

    architecture: str
    steps: tuple[Step, ...]
    dtype: str = "float32"
    call: FrozenDict = field(default_factory=FrozenDict)

    @property
    def id(self) -> str:
        """A name that says everything."""
        sizes = " ".join(f"{k}={v}" for k, v in self.call.items())
        return ", ".join(filter(None, (self.architecture, self.dtype, sizes, *map(str, self.steps))))

    def made(self, *, small_tiles: bool = True) -> tuple[Any, dict[str, Any]]:
        """Return its pipeline on the CPU, as it is loaded in its dtype, and its call; `small_tiles` as there."""
        import torch

        from engine.dryrun import build

        pipe, usual = pipelines.made(self.architecture, small_tiles=small_tiles)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                build.as_loaded(component, getattr(torch, self.dtype)).requires_grad_(False)
        return pipe, usual | dict(self.call)


def _step(name: str, **params: Any) -> Step:
    return optimizers.spec(name).step(params)


PLACEMENTS: dict[str, Step] = {
    "resident": _step("resident"),
    "model_offload": _step("model_offload"),
    "sequential_offload": _step("sequential_offload"),
    "leaf": _step("group_offload", use_stream=False),
    "leaf, streamed": _step("group_offload"),
    "block": _step("group_offload", type="block_level", use_stream=False),
    "two blocks": _step("group_offload", type="block_level", use_stream=False, blocks_per_group=2),
    "block, streamed": _step("group_offload", type="block_level"),
}
"""Every placement, with every way of grouping."""

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_DENOISER = ("transformer", "unet")
_VAE = ("vae",)
# Names that a pipeline does not have are passed by, so that one list serves all.
_BLOCKS = {"type": "block_level"}
MIXTURES: dict[str, tuple[Step, ...]] = {
    "vae resident, model_offload": (_step("resident", components=_VAE), _step("model_offload")),
    "model_offload, denoiser resident": (_step("model_offload", components=(*_TEXT, *_VAE)),),
    "denoiser resident, sequential_offload": (_step("resident", components=_DENOISER), _step("sequential_offload")),
    "text resident, sequential_offload": (_step("sequential_offload"), _step("resident", components=_TEXT)),
    "leaf of the denoiser, streamed": (_step("group_offload", components=_DENOISER),),
    "leaf, text resident": (_step("group_offload", use_stream=False), _step("resident", components=_TEXT)),
    "block, streamed, vae named resident": (_step("resident", components=_VAE), _step("group_offload", **_BLOCKS)),
    "block of the denoiser, leaf": (
        _step("group_offload", components=_DENOISER, **_BLOCKS),
        _step("group_offload", use_stream=False),
    ),
    "block of the denoiser, leaf of the text, both streamed": (
        _step("group_offload", components=_TEXT),
        _step("group_offload", components=_DENOISER, **_BLOCKS),
        _step("resident"),
    ),
    "leaf, streamed, pinned in turn": (_step("group_offload", low_cpu_mem_usage=True),),
    "block, streamed, pinned in turn": (_step("group_offload", low_cpu_mem_usage=True, **_BLOCKS),),
    "two blocks of the text, leaf, streamed": (
        _step("group_offload", components=_TEXT, use_stream=False, blocks_per_group=2, **_BLOCKS),
        _step("group_offload"),
    ),
}
"""Components placed apart, as the libraries can do it; and groups that are pinned as they come."""

CASTS: dict[str, tuple[Step, ...]] = {
    "text and denoiser in fp8": (_step("layerwise_casting", components=(*_TEXT, *_DENOISER)), PLACEMENTS["resident"]),
    "text in fp8, model_offload": (_step("layerwise_casting", components=_TEXT), PLACEMENTS["model_offload"]),
    "text in fp8, sequential_offload": (_step("layerwise_casting", components=_TEXT), PLACEMENTS["sequential_offload"]),
    "text and denoiser in fp8, leaf, streamed": (
        _step("layerwise_casting", components=(*_TEXT, *_DENOISER)),
        PLACEMENTS["leaf, streamed"],
    ),
    "text in fp8, block": (_step("layerwise_casting", components=_TEXT), PLACEMENTS["block"]),
}
"""Layers of text encoders in fewer bits."""

_CASTINGS = (None, _step("layerwise_casting"), _step("layerwise_casting", storage="float8_e5m2"))
_WAYS = ((), ("vae_tiling",), ("vae_slicing",), ("vae_slicing", "vae_tiling"))
_CHANGES = (None, None, None, _step("fuse_qkv"), _step("attention_slicing"), _step("attention_slicing", slices="max"))
# What a VAE of a small pipeline can decode, in pixels.
_SIDES = (32, 32, 64, 64, 96)
_FRAMES = (1, 5, 9, 13, 17)

TILES: dict[str, tuple[int, dict[str, int]]] = {
    "cogvideox": (32, {}),
    "flux": (64, {}),
    "hunyuan_video": (16, {}),
    "ltx": (64, {"height": 128, "width": 96}),
    "sana": (16, {}),
}
"""By architecture: a tile in pixels that its VAE can have, smaller than the picture; and the picture where it is not
the usual one. 32 for every other architecture."""
_TILED = ("resident", "leaf, streamed")


def every_cast(architectures: Iterable[str] | None = None) -> Iterator[Case]:
    """Yield every architecture with its text encoders in fewer bits, under some placements."""
    for name, steps in itertools.product(architectures or pipelines.ALL, CASTS.values()):
        yield Case(architecture=name, steps=steps)


def every_tile(architectures: Iterable[str] | None = None) -> Iterator[Case]:
    """Yield every architecture with its VAE in tiles that are smaller than the library's own, and a batch in slices."""
    for name, placement in itertools.product(architectures or pipelines.ALL, _TILED):
        tile, sizes = TILES.get(name, (32, {}))
        is_batch = placement != "resident" and "num_frames" not in usual_call(name)
        sliced = (_step("vae_slicing"),) if is_batch else ()
        steps = (*sliced, _step("vae_tiling", tile=tile), PLACEMENTS[placement])
        more = {"num_images_per_prompt": 2} if is_batch else {}
        yield Case(architecture=name, steps=steps, call=FrozenDict(sizes | more))


def every_placement(architectures: Iterator[str] | None = None) -> Iterator[Case]:
    """Yield every architecture under every placement, as it is usually called."""
    for name, step in itertools.product(architectures or pipelines.ALL, PLACEMENTS.values()):
        yield Case(architecture=name, steps=(step,))


def every_mixture(architectures: Iterable[str] | None = None, mixtures: Iterable[str] = MIXTURES) -> Iterator[Case]:
    """Yield every architecture under mixtures, as it is usually called."""
    for name, mixture in itertools.product(architectures or pipelines.ALL, mixtures):
        yield Case(architecture=name, steps=MIXTURES[mixture])


def staged(architectures: Iterator[str] | None = None) -> Iterator[Case]:
    """Yield every architecture with its text encoded first, the rest under some placements."""
    for name, placement in itertools.product(
        architectures or pipelines.ALL, ("resident", "model_offload", "leaf, streamed")
    ):
        yield Case(architecture=name, steps=(_step("staged_encoding"), PLACEMENTS[placement]))


def random_cases(seed: int, architectures: Iterable[str] | None = None) -> Iterator[Case]:
    """Yield random cases without end: the same ones for the same seed. What a rule refuses is not among them."""
    draw = random.Random(seed)
    among = list(architectures or pipelines.ALL)
    while True:
        name = draw.choice(among)
        casting, change = draw.choice(_CASTINGS), draw.choice(_CHANGES)
        steps = [change, casting, *(_step(n) for n in draw.choice(_WAYS)), draw.choice(list(PLACEMENTS.values()))]
        case = Case(
            architecture=name,
            dtype=draw.choice(DTYPES),
            call=_sizes(name, draw),
            steps=tuple(s for s in steps if s is not None),
        )
        if is_permitted(case) and acts(case):
            yield case


@cache
def usual_call(name: str) -> FrozenDict:
    """Return the arguments of an architecture's usual call."""
    return FrozenDict(pipelines.made(name)[1])


def several(name: str, count: int) -> dict[str, Any]:
    """Return the arguments with which an architecture draws so many: pictures of one prompt, or a video of each.

    Some pipelines overwrite `num_videos_per_prompt` by 1 (CogVideoX).
    """
    usual = usual_call(name)
    return {"prompt": [usual["prompt"]] * count} if "num_frames" in usual else {"num_images_per_prompt": count}


def drawn_at_once(call: Mapping[str, Any]) -> int:
    """Return how many a call draws."""
    prompts = call["prompt"]
    return (len(prompts) if isinstance(prompts, list) else 1) * int(call.get("num_images_per_prompt", 1))


def _sizes(name: str, draw: random.Random) -> FrozenDict:
    usual = usual_call(name)
    sizes: dict[str, Any] = {"num_inference_steps": draw.choice((2, 3, 4))}
    if "height" in usual:
        sizes |= {"height": draw.choice(_SIDES), "width": draw.choice(_SIDES)}
    if "num_frames" in usual:
        sizes["num_frames"] = draw.choice(_FRAMES)
    else:
        sizes["num_images_per_prompt"] = draw.choice((1, 1, 2, 3))
    return FrozenDict(sizes)


def is_permitted(case: Case) -> bool:
    """Whether no rule of the compatibility schema is broken."""
    dtype = _step("dtype", value=case.dtype)
    facts = compat.Facts(device="cuda", batch=case.call.get("num_images_per_prompt", 1), libraries=compat.installed())
    return not any(f.breaks for f in compat.under(facts).findings((dtype, *case.steps)))


def acts(case: Case) -> bool:
    """Whether what would change the computing can act on the pipeline."""
    try:
        for step in optimizers.changing(case.steps):
            optimizers.get(step.name).apply(case.made()[0], step, Context(device="cpu", dtype=case.dtype))
    except IncompatibleError:
        return False
    return True
