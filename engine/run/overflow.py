"""Whether what a call gave is made of numbers: where it is not, which component lost them, and what helps.

In float16 a value beyond 65,504 is infinite, what is computed of it is soon no number, and a picture of that is black.
diffusers 0.42 makes it black in silence (image_processor.py, `numpy_to_pil`). A picture that is meant to be dark is of
numbers all the same, so that nothing is taken for broken by its looks.

Each component's results are added up where they are, which takes no room there, and is looked at when the call is over.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import IncompatibleError
from engine.facts.casting import is_text_encoder
from engine.optimizers.spec import modules
from engine.run.stages import replaced
from engine.values import Step

_PROCESSORS = ("postprocess_video", "postprocess")


@dataclass(slots=True)
class Watch:
    """What was seen of one call. Its flags are on the device until they are asked for."""

    _components: dict[str, Any] = field(default_factory=dict)
    _latents: Any = None
    _outputs: list[Any] = field(default_factory=list)
    _decoder: str | None = None

    def broken(self, count: int) -> tuple[bool, ...]:
        """Return for each of `count` outputs whether it is broken."""
        import torch

        if self._outputs:
            flags = [bool(f) for f in torch.cat([o.reshape(-1).cpu() for o in self._outputs])]
            return tuple(flags) if len(flags) == count else (any(flags),) * count
        return (self._decoder is not None and self._is_bad(self._decoder),) * count

    def culprit(self) -> str | None:
        """Return the component that lost the numbers first; None where it is not known."""
        if self._latents is None or not bool(self._latents):
            return self._decoder
        bad = [n for n in self._components if n != self._decoder and self._is_bad(n)]
        return next(iter(sorted(bad, key=lambda n: not is_text_encoder(n))), None)

    def _is_bad(self, name: str) -> bool:
        return name in self._components and bool(self._components[name])

    def _see(self, name: str, result: Any) -> None:
        flag = _flag(result)
        if flag is not None:
            before = self._components.get(name)
            self._components[name] = flag if before is None else before.logical_or_(flag)

    def _see_latents(self, name: str, latents: Any) -> None:
        self._decoder = name
        flag = _flag(latents)
        if flag is not None:
            self._latents = flag if self._latents is None else self._latents.logical_or_(flag)

    def _see_outputs(self, images: Any) -> None:
        if (first := _first(images)) is not None and first.ndim > 1:
            self._outputs.append(~first.flatten(1).sum(1, dtype=_wide(first)).isfinite())


@contextlib.contextmanager
def watching(pipe: Any) -> Iterator[Watch]:
    """Watch the calls of a pipeline. What they compute is the same, bit for bit."""
    watch = Watch()
    with contextlib.ExitStack() as stack:
        for name, module in modules(pipe).items():
            see = functools.partial(watch._see, name)
            handle = module.register_forward_hook(lambda _, __, result, see=see: see(result))
            stack.callback(handle.remove)
            if not is_text_encoder(name) and callable(getattr(module, "decode", None)):
                stack.enter_context(replaced(module, "decode", _decoding(watch, name, module.decode)))
        for part in vars(pipe).values():
            if hasattr(part, "numpy_to_pil"):
                stack.enter_context(_processing(watch, part))
        yield watch


def _decoding(watch: Watch, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def decode(*args: Any, **given: Any) -> Any:
        watch._see_latents(name, args[0] if args else next(iter(given.values()), None))
        result = real(*args, **given)
        watch._see(name, result)
        return result

    return decode


@contextlib.contextmanager
def _processing(watch: Watch, processor: Any) -> Iterator[None]:
    """Watch what is made into pictures; a video's frames are made so one video after another."""
    is_within = False

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def process(images: Any, *args: Any, **given: Any) -> Any:
            nonlocal is_within
            if is_within:
                return real(images, *args, **given)
            watch._see_outputs(images)
            is_within = True
            try:
                with warnings.catch_warnings():
                    # It says that a cast is invalid; here it is said what that means.
                    warnings.filterwarnings("ignore", "invalid value encountered in cast")
                    return real(images, *args, **given)
            finally:
                is_within = False

        return process

    with contextlib.ExitStack() as stack:
        for name in _PROCESSORS:
            if callable(real := getattr(processor, name, None)):
                stack.enter_context(replaced(processor, name, watched(real)))
        yield


def _first(result: Any) -> Any:
    """Return the first tensor of numbers with a fraction in a result; None where there is none."""
    import torch

    if isinstance(result, torch.Tensor):
        return result if result.is_floating_point() and result.numel() else None
    items = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else ()
    return next((found for item in items if (found := _first(item)) is not None), None)


def _flag(result: Any) -> Any:
    """Return, on its device, whether a result is not all of numbers. A sum is not, where one that is summed is not."""
    first = _first(result)
    return None if first is None or first.device.type == "meta" else ~first.sum(dtype=_wide(first)).isfinite()


def _wide(tensor: Any) -> Any:
    """Return a precision in which a sum of these does not overflow by itself."""
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def error(
    culprit: str | None, pipe_class: str, steps: Sequence[Step], arch: tuple[int, int] | None
) -> IncompatibleError:
    """Return what to say of broken outputs: what lost the numbers, and what helps under the steps of a plan.

    `arch` is the card's compute capability; None is no card, or one that is not known.
    """
    by = {s.name: s.params for s in steps}
    dtype = str(by.get("dtype", {}).get("value", "float32"))
    of = f" of {culprit}" if culprit else ""
    what = "the output is broken (what is no number is black): " + (
        "what it was decoded from was no number" if culprit is None else f"{culprit} gave what is no number"
    )
    if dtype == "float16":
        wider = "float32" if arch is not None and arch < (8, 0) else "bfloat16"
        why = f"float16 holds nothing beyond 65,504, and values{of} go beyond it"
        do = f"compute in {wider}: --torch_dtype {wider}"
        if culprit == "vae" and pipe_class.startswith("StableDiffusionXL"):
            do += "; or take a VAE that is made for float16, as madebyollin/sdxl-vae-fp16-fix is"
    elif "layerwise_casting" in by:
        why = f"weights{of} are kept in {by['layerwise_casting'].get('storage', 'fewer bits')}, which may be too few"
        do = "leave it out: --forbid layerwise_casting"
    else:
        why = f"{dtype} is wide enough: more likely weights{of} are damaged, or the guidance is too strong"
        do = "get the model's files again, or lower --guidance_scale"
    return IncompatibleError(what, why, do)
