"""Outlooks that are made ahead, by processes of their own: a card does not wait for its predictions."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from bench.gpu import predict
from bench.gpu.matrix import Case
from bench.gpu.predict import Outlook
from engine.values import Hardware

_MOST_PROCESSES = 6


@contextlib.contextmanager
def outlooks(cases: Sequence[Case], hardware: Hardware, *, forks: bool) -> Iterator[Callable[[Case], Outlook] | None]:
    """Give a function that returns a case's outlook on this hardware, made ahead; None where nothing is made ahead."""
    spare = max(1, (os.cpu_count() or 1) - 2)
    if not forks:
        yield None
        return
    # Not forked from here: NVML was started in this process.
    with ProcessPoolExecutor(min(_MOST_PROCESSES, spare), multiprocessing.get_context("spawn")) as pool:
        coming: dict[str, Future[Outlook]] = {c.id: pool.submit(predict.outlook, c, hardware) for c in cases}
        try:
            yield lambda case: coming[case.id].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
