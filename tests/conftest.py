"""What tests share: a cache of their own, no card unless a test brings one, and the embedded pipeline."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Small tensors gain nothing by more threads, and workers side by side would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from engine import probe
from engine.estimate import store
from engine.values import Gpu, Hardware, Host

# How long an example takes is no property of the code: machines that test are busy.
_CHECKS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dg-run", max_examples=30, **_CHECKS)  # type: ignore[arg-type]
settings.register_profile("thorough", max_examples=400, **_CHECKS)  # type: ignore[arg-type]
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dg-run"))

GIB = 1024**3
RTX_4090 = "GeForce RTX 4090"

LONG = (
    *("test_host_memory.py", "test_accuracy.py", "test_advice.py", "test_hub.py", "test_resume.py"),
    *("test_outputs.py", "test_truth.py"),
)
"""Files in which one test takes some ten seconds or more, in the order in which they begin.

Of two workers none is to be left with one of these at the end, and the other has something to do while the first of
them builds the counted device.
"""


def pytest_sessionstart() -> None:
    """Keep Python's collector from running while libraries and tests are imported: a fifth of the time that takes."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long (`make test` lets pytest-xdist keep this order)."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    """Let Python's collector run again."""
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _others_left_alone() -> None:
    """What the libraries and earlier tests hold is not looked through again at every `gc.collect()` of a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cache_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this process, with the dry runs and the answers of all that test side by side."""
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent / "of all" if "PYTEST_XDIST_WORKER" in os.environ else own
    (own / "cache").mkdir()
    for name in ("traces", "estimates"):
        (of_all / name).mkdir(parents=True, exist_ok=True)
        (own / "cache" / name).symlink_to(of_all / name)
    return own / "cache"


@pytest.fixture(scope="session", autouse=True)
def _own_places(cache_of_all: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's own cache, state and models out of the tests, and the network."""
    own = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DG_RUN_CACHE", str(cache_of_all))
        patch.setenv("DG_RUN_STATE", str(own / "state"))
        patch.setenv("DG_RUN_CONFIG", str(own / "config"))
        patch.setenv("HF_HUB_CACHE", str(own / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("DG_GROUP_OFFLOAD_TYPE", "DG_STORAGE_DTYPE", "DG_COMPUTE_DTYPE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def no_estimates() -> Iterator[None]:
    """As without torch: nothing is dry-run, no answer is remembered, and profiles are chosen by `match` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "can_trace", lambda: False)
        patch.setattr(store, "known", lambda wanted: None)
        patch.setattr(store.Answers, "get", lambda self, name: None)
        yield


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an accelerator, whatever this one has."""
    monkeypatch.setattr(probe, "snapshot", lambda: machine())


def card(free_gib: float | None = 23.0, *, arch: str | None = "8.9", index: int = 0, name: str = "Test Card") -> Gpu:
    """Return a card with so much free."""
    return Gpu(
        index=index,
        name=name,
        uuid=f"GPU-00000000-0000-0000-0000-{index:012d}",
        arch=arch,
        total_bytes=24 * GIB,
        free_bytes=None if free_gib is None else int(free_gib * GIB),
    )


def machine(*gpus: Gpu) -> Hardware:
    """Return a machine with these cards."""
    host = Host(ram_bytes=32 * GIB, total_ram_bytes=64 * GIB, cores=8, platform="linux")
    return Hardware(gpus=gpus, host=host, no_gpu_because=None if gpus else "no NVIDIA driver was found")


@pytest.fixture
def pipe() -> Iterator[Any]:
    """The embedded pipeline, fresh, in float32 on the CPU, its bars off."""
    from diffusers import DiffusionPipeline

    from engine import paths

    loaded = DiffusionPipeline.from_pretrained(paths.embedded_model_dir())
    loaded.set_progress_bar_config(disable=True)
    yield loaded


def draw(pipe: Any, **more: Any) -> Any:
    """Return one picture from a pipeline, as an array; the same noise every time."""
    import numpy as np
    import torch

    arguments: dict[str, Any] = {
        "prompt": "a red circle on a blue background",
        "height": 128,
        "width": 128,
        "num_inference_steps": 2,
        "max_sequence_length": 32,
        "generator": torch.Generator().manual_seed(0),
    } | more
    return np.stack([np.asarray(i) for i in pipe(**arguments).images])


def write(folder: Path, name: str, text: str) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
