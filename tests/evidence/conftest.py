"""What the evidence shares: the counted device, and no gradients."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from truth import device


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Let a collection, which every count of bytes begins with, pass over what the libraries made at their import."""
    import diffusers  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def counted() -> torch.device:
    """The counted device; a test that asks for it is skipped where no compiler can build one."""
    if shutil.which("c++") is None and "CI" not in os.environ:
        pytest.skip("the counted device takes a C++ compiler (c++)")
    device.load()
    return torch.device(device.NAME)
