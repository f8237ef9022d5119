"""Pictures of what is being drawn, while it is: `NAME.preview.png` beside the output, replaced as it goes on.

A preview is decoded on the host, by a copy of the VAE that is there, from latents that are made smaller. Nothing is
computed on the device and nothing is kept there, so that the prediction stands, and the output is the same bit for bit.
It is looked at so seldom that it takes a tenth of the time at most. The copy takes memory of the host: the VAE's
weights in float32 (0.3 GiB for FLUX).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.run import media
from engine.run.progress import Progress

_SIDE = 32
"""Latents along the longer side of a preview."""
_REST = 9
"""How many times as long as a preview takes nothing is previewed."""


@dataclass(frozen=True, slots=True)
class View:
    """How latents are seen: by a VAE on the host, which has so many channels."""

    vae: Any
    channels: int
    is_video: bool

    def picture(self, latents: Any, size: tuple[int, int] | None = None) -> Any:
        """Return the picture of latents of shape (channels, height, width) on the host, made `size` large."""
        import torch
        from PIL import Image

        high, wide = latents.shape[1:]
        less = min(1.0, _SIDE / max(high, wide))
        small = (max(1, round(high * less)), max(1, round(wide * less)))
        with torch.no_grad():
            few = torch.nn.functional.interpolate(latents[None].float(), small, mode="area")
            raw = _as_encoded(self.vae, few)
            seen = self.vae.decode(raw[:, :, None] if self.is_video else raw, return_dict=False)[0]
        seen = (seen[0, :, 0] if self.is_video else seen[0]) / 2 + 0.5
        pixels = (seen.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        made = Image.fromarray(pixels)
        return made if size is None else made.resize(size, Image.Resampling.BICUBIC)


def path(of: Path) -> Path:
    """Return where an output is previewed that goes to `of`."""
    return of.with_name(f"{of.stem}.preview{media.PICTURE_SUFFIX}")


def view(pipe: Any, told: Progress) -> View | None:
    """Return how the latents of a pipeline are seen; None, and a note, where that is not known."""
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(getattr(pipe, "scheduler", None), "step"):
        because = f"{type(pipe).__name__} has no VAE, or no scheduler, of its own"
    elif any(w.device.type == "meta" for w in vae.parameters()):
        because = "the VAE's weights come layer by layer (sequential_offload)"
    else:
        try:
            with told.stage("copying the VAE for the preview"):
                return _of(vae)
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            # What a foreign VAE raises is not one class, and no preview is worth the run.
            because = f"{type(vae).__name__}: {' '.join(str(error).split())[:120]}"
    told.say(f"note: there is no preview: {because}")
    return None


def _of(vae: Any) -> View:
    """Return how the latents of a VAE are seen, wherever its weights are and whatever hooks it has."""
    import torch

    with torch.random.fork_rng(devices=[]):  # making it draws numbers, and the run's are its own
        twin = type(vae).from_config(vae.config).eval().requires_grad_(False)
    twin.load_state_dict({k: v.detach().to("cpu", torch.float32) for k, v in vae.state_dict().items()})
    channels = vae.config.get("latent_channels") or vae.config["z_dim"]
    return View(twin, channels, any(isinstance(m, torch.nn.Conv3d) for m in twin.modules()))


def _as_encoded(vae: Any, latents: Any) -> Any:
    """Return latents as the VAE knows them, from what pipelines of diffusers 0.42 denoise."""
    import torch

    config = vae.config
    raw = latents / (config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return raw + (config.get("shift_factor") or 0.0)
    mean, std = (torch.tensor(config[n]).view(1, -1, 1, 1) for n in ("latents_mean", "latents_std"))
    return raw * std + mean


@contextlib.contextmanager
def shown(pipe: Any, seen: View, where: Path, size: tuple[int, int] | None, told: Progress) -> Iterator[None]:
    """Show what the first output of a call looks like, at `where`, while it is made; at the end it is gone.

    `size` is width and height of the output in pixels.
    """
    show = _Shown(pipe, seen, where, size, told)
    scheduler, kind = pipe.scheduler, type(pipe.scheduler)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **given: Any) -> Any:
        result = kind.step(self, *args, **given)
        if self is scheduler:
            show.step(result, args[0] if args else given.get("model_output"))
        return result

    scheduler.step = types.MethodType(step, scheduler)
    try:
        yield
    finally:
        del scheduler.step
        with contextlib.suppress(OSError):
            where.unlink(missing_ok=True)


class _Shown:
    def __init__(self, pipe: Any, seen: View, where: Path, size: tuple[int, int] | None, told: Progress) -> None:
        self.pipe, self.seen, self.where, self.size, self.told = pipe, seen, where, size, told
        self.is_over, self.next_s = False, 0.0

    def step(self, result: Any, model_output: Any) -> None:
        """Show what a step gave. Whatever goes wrong ends the previews, and not the run."""
        start = time.monotonic()
        if self.is_over or start < self.next_s:
            return
        try:
            latents = self._plain(self._expected(result, model_output))
            if latents is None:
                self._end(f"how {type(self.pipe).__name__} packs its latents is not known")
                return
            media.write(self.seen.picture(latents, self.size), self.where, {})
            end = time.monotonic()
            self.next_s = end + _REST * (end - start)
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            self._end(" ".join(str(error).split())[:120])

    def _end(self, because: str) -> None:
        self.is_over = True
        self.told.say(f"note: there is no preview: {because}")

    def _expected(self, result: Any, model_output: Any) -> Any:
        """Return the first sample on the host: as it is expected to become, where the scheduler tells."""
        several = result if isinstance(result, tuple) else tuple(result.values())
        here = several[0][:1].detach().to("cpu")
        if len(several) > 1 and getattr(several[1], "shape", None) == several[0].shape:
            return several[1][:1].detach().to("cpu")
        scheduler = self.pipe.scheduler
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and scheduler.step_index is not None:
            # What it steps along leads from noise to the sample: x = sample + sigma · (noise - sample).
            return here - scheduler.sigmas[scheduler.step_index].cpu() * model_output[:1].detach().to("cpu")
        return here

    def _plain(self, latents: Any) -> Any:
        """Return latents as (channels, height, width), of a video its middle frame; None where that is not known."""
        if latents.ndim == 3:
            latents = self._unpacked(latents)
        if latents is not None and latents.ndim == 5:
            axis = 2 if latents.shape[1] == self.seen.channels else 1  # CogVideoX has the frames first
            latents = latents.select(axis, latents.shape[axis] // 2)
        if latents is None or latents.ndim != 4 or latents.shape[1] != self.seen.channels:
            return None
        return latents[0]

    def _unpacked(self, latents: Any) -> Any:
        """Return packed latents as a pipeline like FLUX unpacks them: by the size in pixels."""
        unpack = getattr(type(self.pipe), "_unpack_latents", None)
        if unpack is None or self.size is None:
            return None
        if list(inspect.signature(unpack).parameters) != ["latents", "height", "width", "vae_scale_factor"]:
            return None
        return unpack(latents, self.size[1], self.size[0], self.pipe.vae_scale_factor)
