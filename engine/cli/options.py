"""The options, their spellings, and what they mean for `engine.resolve`.

The reference guide's flags keep their names. An option is written with underscores or hyphens, as one likes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine import optimizers, pictures
from engine.arguments import DEVICES, PREFERENCES, QUALITIES
from engine.errors import IncompatibleError, UsageError
from engine.values import Step
from engine.words import did_you_mean, listing

COMMANDS = {
    "show": "show what an output was made with",
    "plan": "show what would be run, and why, without running it",
    "profiles": "list and show profiles",
    "doctor": "show what this machine has, and what is missing",
    "calibrate": "measure this machine's card once, for better plans",
}
_FLAGS = {
    "torch_dtype": "dtype",
    "enable_vae_slicing": "vae_slicing",
    "enable_vae_tiling": "vae_tiling",
    "enable_cpu_offload": "model_offload",
    "enable_sequential_cpu_offload": "sequential_offload",
    "enable_group_offloading": "group_offload",
    "enable_layerwise_casting": "layerwise_casting",
}
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """argparse, except that hyphens and underscores are one, and a mistake raises with the nearest right word."""

    def __init__(self, prog: str, description: str, **kwargs: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed arguments. Raises: UsageError."""
        words = [_underscored(a) for a in arguments]
        if foreign := [w for w in words if any("\ud800" <= c <= "\udfff" for c in w)]:
            what = foreign[0].encode("utf-8", "replace").decode()
            raise UsageError(f"{what!r} is not text in UTF-8", do="write it in UTF-8, or give the file another name")
        options, rest = self.parse_known_args(words)
        if not rest:
            options.told = self._told(words)
            return options
        flags = sorted(o for action in self._actions for o in action.option_strings if o.startswith("--"))
        what = "option" if rest[0].startswith("-") else "argument"
        meant = did_you_mean(rest[0].partition("=")[0], flags) if what == "option" else ""
        raise UsageError(
            f"{self.prog} has no {what} {rest[0]!r}",
            do=f"{meant} `{self.prog} --help` lists them".strip(),
        )

    def _told(self, words: Sequence[str]) -> dict[str, str]:
        """Return what was said, as destinations with their flags: one that says its default was said, too."""
        flags = {flag: a.dest for a in self._actions for flag in a.option_strings if flag.startswith("--")}
        said = (w.partition("=")[0] for w in words)
        return {flags[w]: w for w in said if w in flags}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, do=f"`{self.prog} --help` shows how it is written")


def alone(options: argparse.Namespace, owner: str, beside: Collection[str], why: str) -> None:
    """Refuse a flag that was given beside `owner`, unless it is one of `beside`. Raises: UsageError, naming both."""
    others = [flag for dest, flag in options.told.items() if dest not in (owner, *beside)]
    if others:
        listed = listing(dict.fromkeys(others))
        raise UsageError(
            f"{options.told[owner]} and {listed} contradict each other", why, f"leave {listed} out, or --{owner}"
        )


def _underscored(argument: str) -> str:
    """Return an option with underscores: --host-ram=1GiB as --host_ram=1GiB. Values are left alone."""
    if not re.match(r"--[A-Za-z]", argument):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def whole(text: str) -> int:
    """Return a whole number, for argparse."""
    if not re.fullmatch(r"[-+]?\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    """Return a number, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def add_job(parser: Parser) -> None:
    """Add what makes a plan into a picture."""
    parser.add_argument(
        "--auto",
        action="store_true",
        help="read the machine and choose a profile; else exactly the listed optimizers are applied",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to draw")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="several of them: .txt, one a line, or .jsonl, an object a line; a run that ended is gone on with",
    )
    parser.add_argument("--num_images", type=whole, metavar="N", help="outputs of each prompt (default: --batch_size)")
    parser.add_argument(
        "--seed", type=whole, metavar="N", help="the same seed, the same picture (default: a new one, which is said)"
    )
    parser.add_argument(
        "--output",
        metavar="FILE|DIR/",
        help="where it goes: a .png (a .mp4 for videos), or a folder (default: a new name in outputs/)",
    )
    parser.add_argument(
        "--preview", action="store_true", help="show what is being made, in NAME.preview.png beside the output"
    )


def add_request(parser: Parser) -> None:
    """Add what a plan is made from: the request, the hardware, the optimizers, and what guides the choice."""
    _add_sizes(parser)
    _add_hardware(parser)
    _add_optimizers(parser)
    _add_choice(parser)


def _add_sizes(parser: Parser) -> None:
    group = parser.add_argument_group("what to draw with")
    group.add_argument(
        "--model",
        "--model_name",
        metavar="ID|DIR",
        help="a directory, or OWNER/MODEL[@REVISION] on the hub (default: the embedded model)",
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="fuse a LoRA (safetensors: a file, a folder, OWNER/MODEL[/FILE] on the hub); repeatable",
    )
    group.add_argument("--height", type=whole, metavar="PX")
    group.add_argument("--width", type=whole, metavar="PX")
    group.add_argument("--batch_size", type=whole, default=1, metavar="N", help="outputs at a time (default: 1)")
    group.add_argument("--num_frames", type=whole, metavar="N", help="frames, for a video model")
    group.add_argument("--num_inference_steps", type=whole, metavar="N", help="denoising steps")
    group.add_argument("--guidance_scale", type=number, metavar="X")
    group.add_argument("--negative_prompt", metavar="TEXT")
    group.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture to begin with: the size is its own where none is given"
    )
    group.add_argument(
        "--strength", type=number, metavar="X", help="how much of --image is drawn anew, from 0 to 1 (else the model's)"
    )
    group.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the pipeline's call; repeatable",
    )


def _add_hardware(parser: Parser) -> None:
    group = parser.add_argument_group("what to run on")
    group.add_argument(
        "--device", choices=DEVICES, help="cpu leaves the card alone; cuda insists on it (default: what is there)"
    )
    group.add_argument("--gpu", metavar="NAME", help="index, UUID or name of the card")
    group.add_argument("--vram", metavar="SIZE", help="use at most this much of what is free, such as 12GiB")
    group.add_argument("--host_ram", metavar="SIZE", help="use at most this much host memory")
    group.add_argument("--headroom", metavar="SIZE", help="leave this much of the free VRAM alone (default: 512MiB)")


def _add_optimizers(parser: Parser) -> None:
    group = parser.add_argument_group(
        "how to make it fit", "with --auto these are conditions on the choice, without it they are the whole list"
    )
    group.add_argument("--torch_dtype", choices=DTYPES)
    group.add_argument("--enable_vae_slicing", action="store_true", help="decode a batch one picture at a time")
    group.add_argument("--enable_vae_tiling", action="store_true", help="decode a large picture in tiles")
    group.add_argument("--enable_cpu_offload", action="store_true", help="one component at a time on the card")
    group.add_argument("--enable_sequential_cpu_offload", action="store_true", help="one layer at a time on the card")
    group.add_argument(
        "--enable_group_offloading", action="store_true", help="groups of layers in turn (DG_GROUP_OFFLOAD_TYPE)"
    )
    group.add_argument(
        "--enable_layerwise_casting",
        action="store_true",
        help="weights in fewer bits (DG_STORAGE_DTYPE, DG_COMPUTE_DTYPE)",
    )
    group.add_argument(
        "--backend",
        choices=("diffusers", "xdit"),
        default="diffusers",
        help="xdit: one picture on several cards (DG_XDIT_…)",
    )
    group.add_argument("--num_gpus", type=whole, metavar="N", help="cards for xdit")


def _add_choice(parser: Parser) -> None:
    group = parser.add_argument_group("how to choose")
    group.add_argument("--profile", metavar="NAME|FILE", help="use this profile (`dg-run profiles list`)")
    group.add_argument(
        "--require", action="append", default=[], metavar="NAME", help="insist on an optimizer; repeatable"
    )
    group.add_argument(
        "--forbid", action="append", default=[], metavar="NAME", help="do without an optimizer; repeatable"
    )
    group.add_argument(
        "--quality",
        choices=QUALITIES,
        default="near",
        help="how far the picture may differ from the plain pipeline's (default: near)",
    )
    group.add_argument(
        "--prefer", choices=PREFERENCES, help="what goes first: speed (the default), quality, or the least of the card"
    )


def request(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `engine.resolve` that both commands share. Raises: UsageError, IncompatibleError."""
    _refuse_contradictions(options)
    call = _call(options)
    return {
        "model": options.model,
        "loras": options.lora,
        "height": options.height,
        "width": options.width,
        "frames": options.num_frames,
        "batch": options.batch_size,
        "steps": options.num_inference_steps,
        "guidance": options.guidance_scale,
        "call": call,
        "device": options.device,
        "gpu": options.gpu,
        "vram": options.vram,
        "host_ram": options.host_ram,
        "headroom": options.headroom,
    }


def _call(options: argparse.Namespace) -> dict[str, Any]:
    """Return the further arguments of the call; an image is opened.

    Raises: UsageError, for one that is given two values; FileError, for an image that is none.
    """
    said: dict[str, tuple[str, Any]] = {}
    for flag in ("negative_prompt", "strength", "image"):
        if (value := getattr(options, flag)) is not None:
            said[flag] = f"--{flag}", value
    for text in options.call:
        name, value = _call_argument(text)
        if name in said and said[name][1] != value:
            raise UsageError(
                f"{said[name][0]} and --call {text} contradict each other", f"both give {name}", "leave one of them out"
            )
        said[name] = f"--call {text}", value
    call = {name: value for name, (_, value) in said.items()}
    if isinstance(call.get("image"), str | Path):
        call["image"] = pictures.read(call["image"])
    return call


def _refuse_contradictions(options: argparse.Namespace) -> None:
    """Refuse flags of which only one can be meant, naming both. Raises: UsageError, IncompatibleError."""
    for beside in ("gpu", "vram"):
        if options.device == "cpu" and beside in options.told:
            why = "one leaves the card alone, the other says how to use it"
            raise UsageError(f"--device cpu and --{beside} contradict each other", why, "leave one of them out")
    said = _named(options)
    for name in options.forbid:
        if name in said:
            why = f"{name} cannot be required and forbidden"
            raise IncompatibleError(
                f"{said[name]} and --forbid {name} contradict each other", why, "leave one of them out"
            )
    for name, flag in said.items():
        spec = optimizers.spec(name)
        if "quality" in options.told and QUALITIES.index(spec.quality) > QUALITIES.index(options.quality):
            raise UsageError(
                f"{flag} and --quality {options.quality} contradict each other",
                f"{name} is {spec.quality}: {spec.summary}",
                f"allow --quality {spec.quality}, or leave {flag} out",
            )
    _refuse_exclusive(said)


def _refuse_exclusive(said: Mapping[str, str]) -> None:
    """Refuse flags whose optimizers exclude each other whatever the model and the machine are."""
    steps = [optimizers.spec(name).step() for name in said]
    from engine import compat  # and YAML with it: an interrupt before `main` has no exit code

    broken = [f for f in compat.general().findings(steps) if f.rule.kind == "excludes"]
    if broken:
        flags = listing(dict.fromkeys(said[name] for f in broken for name in f.subjects))
        refusal = compat.refusal(broken)
        raise IncompatibleError(f"{flags} contradict each other: {refusal.what}", refusal.why, refusal.do)


def _named(options: argparse.Namespace) -> dict[str, str]:
    """Return the optimizers that are asked for, each with the flag that does. Raises: UsageError."""
    said = {name: f"--{flag}" for flag, name in _FLAGS.items() if getattr(options, flag)}
    if options.backend == "xdit":
        said["xdit"] = "--backend xdit"
    return {optimizers.spec(n).name: f"--require {n}" for n in options.require} | said


def _call_argument(text: str) -> tuple[str, Any]:
    """Return (name, value) of NAME=VALUE, the value read as JSON where it is JSON and as text where not."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--call {text!r} is not NAME=VALUE", do="write it as --call max_sequence_length=256")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def constraints(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `engine.resolve` that guide a choice: flags of optimizers are required of it."""
    listed = steps(options)
    named = [optimizers.spec(n).step() for n in options.require if n not in {s.name for s in listed}]
    return {
        "profile": options.profile,
        "require": [*listed, *named],
        "forbid": options.forbid,
        "quality": options.quality,
        "prefer": options.prefer,
    }


def exact(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `engine.resolve` for exactly the listed flags. Raises: UsageError."""
    for name in ("profile", "require", "forbid", "quality", "prefer"):
        if name in options.told:
            raise UsageError(
                f"--{name} guides a choice, and there is none to make",
                "without --auto (or with --exact) the listed optimizers are the whole list",
                f"add --auto, or leave --{name} out",
            )
    return {"optimizers": steps(options)}


def steps(options: argparse.Namespace) -> list[Step]:
    """Return the optimizers that flags and environment variables name. Raises: UsageError, IncompatibleError."""
    made: Mapping[str, Callable[[], Step]] = {
        "torch_dtype": lambda: optimizers.spec("dtype").step({"value": options.torch_dtype}),
        "enable_group_offloading": lambda: _from_environment("group_offload", {"type": "DG_GROUP_OFFLOAD_TYPE"}),
        "enable_layerwise_casting": lambda: _from_environment(
            "layerwise_casting", {"storage": "DG_STORAGE_DTYPE", "compute": "DG_COMPUTE_DTYPE"}
        ),
    }
    listed = [made.get(flag, optimizers.spec(name).step)() for flag, name in _FLAGS.items() if getattr(options, flag)]
    if options.backend == "xdit":
        listed.append(_xdit(options.num_gpus))
    elif options.num_gpus is not None and options.num_gpus != 1:
        raise UsageError(f"--num_gpus {options.num_gpus} needs --backend xdit", "diffusers runs on one card")
    return listed


def _from_environment(name: str, variables: Mapping[str, str]) -> Step:
    """Return a step whose parameters come from environment variables, where they are set."""
    given = {
        param: os.environ[variable].strip()
        for param, variable in variables.items()
        if os.environ.get(variable, "").strip()
    }
    known = {p.name: p for p in optimizers.spec(name).params}
    for param, value in given.items():
        if value not in known[param].choices:
            raise UsageError(f"{variables[param]} cannot be {value!r}", do=did_you_mean(value, known[param].choices))
    return optimizers.spec(name).step(given)


def _xdit(num_gpus: int | None) -> Step:
    """Return the xdit step of the environment; the degrees multiply to the number of cards."""
    degrees = {
        f"{d}_degree": _degree(f"DG_XDIT_{d.upper()}_DEGREE")
        for d in ("data_parallel", "ulysses", "ring", "pipefusion")
    }
    cfg = _switch("DG_XDIT_USE_CFG_PARALLEL")
    product = 2 if cfg else 1
    for degree in degrees.values():
        product *= degree
    if num_gpus is not None and product not in (1, num_gpus):
        raise IncompatibleError(
            f"--num_gpus {num_gpus} and the DG_XDIT_ degrees do not agree",
            f"the degrees multiply to {product}" + (", guidance in parallel counting 2" if cfg else ""),
            f"set --num_gpus {product}, or other degrees",
        )
    return optimizers.spec("xdit").step({"num_gpus": num_gpus or product, "use_cfg_parallel": cfg, **degrees})


def _degree(variable: str) -> int:
    text = os.environ.get(variable, "").strip() or "1"
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise UsageError(f"{variable} cannot be {text!r}", do="give a whole number from 1 to 1024")
    return int(text)


def _switch(variable: str) -> bool:
    text = os.environ.get(variable, "").strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    raise UsageError(f"{variable} cannot be {text!r}", do="give true or false")
