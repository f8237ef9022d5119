"""What a run takes of the host, measured from within: a process of its own, which says it in JSON.

    python -m tests.host_memory FOLDER PLACEMENT DTYPE

The host's own memory is what the kernel says is anonymous of the process (`RssAnon` in /proc/self/status; pages of
files are not, and can be dropped), less what the counted device holds, which is host memory that stands for a card's.
Pinned copies are among it, as they are among a plan's `host_bytes`.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS: dict[str, list[Any]] = {
    "resident": ["resident"],
    "staged_encoding": ["staged_encoding", "resident"],
    "staged_encoding, model_offload": ["staged_encoding", "model_offload"],
    "model_offload": ["model_offload"],
    "group_offload": [{"name": "group_offload", "params": {"use_stream": False}}],
    "group_offload, streamed": ["group_offload"],
    "group_offload, pinned in turn": [{"name": "group_offload", "params": {"low_cpu_mem_usage": True}}],
    "sequential_offload": ["sequential_offload"],
}
CALL = {"height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 32}
_WIDER = {
    "transformer": {"num_attention_heads": 32, "num_layers": 2, "num_single_layers": 2},
    "text_encoder_2": {"num_layers": 12, "d_ff": 16384, "d_kv": 2048},
}


def write_model(folder: Path) -> None:
    """Write a pipeline of some 340 MB in bfloat16: the embedded one, its denoiser and one text encoder made wider."""
    import torch

    from engine import paths
    from engine.dryrun import build
    from engine.facts import directory

    shutil.copytree(paths.embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, wider in _WIDER.items():
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | wider))
    model = directory.read(folder, str(folder))
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        module = build.component(model, name, torch.bfloat16).to_empty(device="cpu")
        with torch.no_grad():
            for weight in (*module.parameters(), *module.buffers()):
                weight.fill_(0.01 if weight.is_floating_point() else 0)
        module.save_pretrained(folder / name)


class Watch:
    """Reads what the process holds, again and again, in a thread of its own."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, host_bytes())


def host_bytes() -> int:
    """Return what the process holds of the host now, without pages of files and what is on the counted device."""
    from truth import device

    before = device.counts().live_bytes
    with Path("/proc/self/status").open(encoding="ascii") as status:
        (line,) = [line for line in status if line.startswith("RssAnon:")]
    # Read before and after: what is freed meanwhile must not look like the host's.
    return int(line.split()[1]) * 1024 - max(before, device.counts().live_bytes)


def measured(folder: Path, placement: str, dtype: str) -> dict[str, int]:
    """Return what a plan says of the host, and what its run held: at its most, and before anything was loaded."""
    import torch

    import engine
    from engine.estimate import store
    from engine.optimizers.spec import Context
    from engine.run import device as run_device
    from engine.run import load, staged, stages
    from engine.run.progress import Quiet
    from tests.conftest import RTX_4090, card, machine
    from tests.test_components import Here
    from truth import device

    device.load()
    store._dry = Here()  # in this process: another one would have torch to import first
    steps = [{"name": "dtype", "params": {"value": dtype}}, *STEPS[placement]]
    plan = engine.resolve(
        folder, height=64, width=64, steps=1, call={"max_sequence_length": 32}, optimizers=steps,
        hardware=machine(card(name=RTX_4090)),
    )  # fmt: skip
    taken = plan.estimate
    assert taken.host_bytes is not None, plan.notes
    run_device.choose = lambda _: None  # type: ignore[assignment]
    here = Context(device=device.NAME, dtype=dtype)

    def call(_: Any) -> Iterator[dict[str, Any]]:
        yield {"prompt": "a red circle", **CALL, "generator": torch.Generator().manual_seed(0)}

    with load.opened(plan, Quiet()) as source:
        whole = source.parts()
        gc.collect()
        before = host_bytes()
        with Watch() as watch, torch.no_grad():
            if "staged_encoding" in placement:
                first = staged.first(whole, plan.optimizers, call, here, Quiet())
                pipe = staged.second(whole, plan.optimizers, first, here, Quiet())
                with stages.given(pipe, first.encoded[0], here.device):
                    pipe(**next(call(pipe)))
            else:
                pipe = load.made(whole, list(whole.twins), plan.optimizers, {}, here, Quiet())
                pipe(**next(call(pipe)))
            time.sleep(0.01)
    return {
        "anonymous_bytes": taken.host.anonymous_bytes or 0,
        "pinned_bytes": taken.host.pinned_bytes or 0,
        "file_bytes": taken.host.file_bytes or 0,
        "before_bytes": before,
        "peak_bytes": watch.peak_bytes,
    }


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), *sys.argv[2:4])))
