"""Run many cases, in as many processes as are asked for."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from truth import device

S = TypeVar("S")
T = TypeVar("T")


def prepare() -> None:
    """Make a process ready for many cases in a row."""
    import diffusers
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    device.load()
    gc.collect()
    gc.freeze()  # what the libraries are made of is not looked through again at every collection: a third of the time


def each(what: Callable[[S], T], cases: Sequence[S], jobs: int) -> Iterator[T]:
    """Yield `what` of each case, in their order; it is a function of a module, so that other processes find it."""
    if jobs == 1:
        prepare()
        yield from map(what, cases)
        return
    device.load()  # before anybody else: it is built once
    # A process that has started torch's threads is not to be forked.
    with multiprocessing.get_context("spawn").Pool(jobs, prepare) as pool:
        yield from pool.imap(what, cases, chunksize=4)
