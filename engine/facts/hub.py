"""Models on the Hugging Face hub: what the cache holds, and, when online, the few kilobytes that say what it is.

Everything goes through huggingface_hub, and so heeds its environment: HF_ENDPOINT, HF_TOKEN, HF_HOME and the rest. What
huggingface_hub does not do is end: it asks for a repository without a timeout, and resumes a download that is cut off
again and again for ever. So its calls run in threads of their own, which are waited for until a deadline.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError
from engine.facts import directory
from engine.facts.model import Model

if TYPE_CHECKING:
    from logging import LogRecord

MAX_FILES = 2 * directory.MAX_COMPONENTS
MAX_BYTES = 4 * directory.MAX_CONFIG_BYTES
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
THREADS = "dg-run-hub"
"""How the names of the threads begin that ask the hub."""


def cached_snapshot(name: str, cache: Path, revision: str | None = None) -> Path | None:
    """Return the cached folder of a hub model at `revision`, or None when its index was never downloaded.

    The revision is a commit, a branch or a tag; None is `main`.
    """
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    try:
        if not _COMMIT.match(commit):
            commit = (repository / "refs" / commit).read_text(encoding="ascii").strip()
        snapshot = repository / "snapshots" / commit
        return snapshot if _COMMIT.match(commit) and (snapshot / directory.INDEX).is_file() else None
    except (OSError, UnicodeDecodeError):
        return None


def has_weights(snapshot: Path) -> bool:
    """Return whether a cached folder holds any weights, and not configurations alone."""
    return any(True for kind in ("safetensors", "bin") for _ in snapshot.glob(f"*/*.{kind}"))


def is_offline() -> bool:
    """Return whether the user told the Hugging Face libraries to stay off the network."""
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in ("1", "ON", "YES", "TRUE")


def fetch(name: str, suggestion: str, cache: Path, revision: str | None = None) -> Model:
    """Return a hub model from its configuration files, downloading those alone (no weights) into the cache.

    Raises: ModelError.
    """
    if is_offline():
        raise ModelError(
            f"the model {_at(name, revision)!r} is not on this machine",
            "HF_HUB_OFFLINE is set, the cache does not hold it, and the catalogue does not know it",
            suggestion,
        )
    with telling(name, revision, suggestion):
        folder = _download(name, revision or "main", cache)
    return directory.read(folder, name, source="hub", revision=folder.name)


@contextlib.contextmanager
def telling(name: str, revision: str | None, suggestion: str) -> Iterator[None]:
    """Say what huggingface_hub, the network or the hub refuses about a model. Raises: ModelError."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    # KeyError and its like: an answer that is not the hub's, from an HF_ENDPOINT that is something else.
    except (transport(), OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        cause: BaseException = error
        while isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise _refusal(name, revision, cause, suggestion) from None


def transport() -> type[Exception]:
    """Return the base of what the HTTP library raises that this huggingface_hub uses (httpx, httpx2)."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def keep_quiet() -> None:
    """Leave out what huggingface_hub remarks of downloads that are ours: the error says it, in one piece."""
    import logging  # which a plan does without

    for logger in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
        logging.getLogger(logger).addFilter(_is_not_ours)  # once: the same filter is not added twice


def _at(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _download(name: str, revision: str, cache: Path) -> Path:
    """Return the snapshot's folder, in which every component's configuration and then the index was put."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    step_s = constants.HF_HUB_ETAG_TIMEOUT
    until = time.monotonic() + 3 * (step_s + constants.HF_HUB_DOWNLOAD_TIMEOUT)
    guard = _guard(until)
    keep_quiet()

    def get(file: str, revision: str) -> str:
        return hf_hub_download(name, file, revision=revision, cache_dir=cache, etag_timeout=step_s, tqdm_class=guard)

    info = together([lambda: HfApi().model_info(name, revision=revision, timeout=step_s)], until)[0]
    files = [sibling.rfilename for sibling in info.siblings or ()]
    # Not every *.json: a tokenizer's can have megabytes, and says nothing about memory.
    wanted = [f for f in files if f.count("/") == 1 and f.endswith(tuple(f"/{c}" for c in directory.CONFIGS))]
    if directory.INDEX not in files or len(wanted) > MAX_FILES:
        raise ModelError(
            f"{_at(name, None if revision == 'main' else revision)} is not a diffusers pipeline",
            f"its repository has no {directory.INDEX}"
            if directory.INDEX not in files
            else f"its repository has {len(wanted):,} configurations",
            "take the model in diffusers layout; often its name ends in -diffusers",
        )
    together([functools.partial(get, file, info.sha) for file in wanted], until)
    # The index comes last: where it lies, all lies. And by the revision's own name, so that the cache knows that name.
    folder = Path(together([lambda: get(directory.INDEX, revision)], until)[0]).parent
    if folder.name != info.sha:
        raise ModelError(
            f"{name} changed while it was being read",
            f"{revision} was {info.sha[:12]}, and now is {folder.name[:12]}",
            "run again",
        )
    return folder


def _is_not_ours(record: LogRecord) -> bool:
    """Whether a remark is of a download that is not ours: what becomes of ours is said by the error, in one piece."""
    return not (record.threadName or "").startswith(THREADS)


def _guard(until: float) -> Any:
    """Return the class of a progress bar that shows nothing, and ends a download that is too long or too large."""

    class Guard:
        def __init__(self, *_: Any, total: int | None = None, **__: Any) -> None:
            self.seen = 0
            self.hold(total or 0)

        def __enter__(self) -> Guard:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def close(self) -> None:
            return None

        def update(self, n: float | None = 1) -> None:
            self.seen += int(n or 0)
            self.hold(self.seen)

        def hold(self, size: int) -> None:
            if size > MAX_BYTES:
                raise ModelError(
                    "the hub sent what is not a model's configuration",
                    f"it has {size:,} bytes or more, and no configuration has more than {MAX_BYTES:,}",
                    "look at the model's page, or take another model",
                )
            if time.monotonic() > until:
                raise TimeoutError("the download took too long")

    return Guard


def together(jobs: Sequence[Callable[[], Any]], until: float) -> list[Any]:
    """Return what the jobs return, done at once. Raises what the first to fail raised; TimeoutError, at `until`.

    Threads that are late are left behind: they are daemons, since an executor's would be waited for at the end.
    """
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def work(number: int, job: Callable[[], Any]) -> None:
        try:
            done.put((number, job(), None))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            done.put((number, None, error))

    for number, job in enumerate(jobs):
        threading.Thread(target=work, args=(number, job), daemon=True, name=f"{THREADS}-{number}").start()
    results: list[Any] = [None] * len(jobs)
    for _ in jobs:
        try:
            number, results_of, error = done.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError("the download took too long") from None
        if error is not None:
            raise error
        results[number] = results_of
    return results


def _refusal(name: str, revision: str | None, error: BaseException, suggestion: str) -> ModelError:
    """Return what to tell the user about an error of huggingface_hub, of the network, or of what the hub sent."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    has_token = get_token() is not None
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, GatedRepoError):
        if status == 403 and has_token:
            return ModelError(
                f"the model {name!r} is gated, and your token has no access to it",
                "the hub knows the token, and its account is not among those that the owner let in",
                f"ask for access on {page}, and wait until it is granted; `hf auth whoami` tells the account",
            )
        return ModelError(
            f"the model {name!r} is gated, and your access was not accepted",
            "its owner asks for an agreement first, and "
            + ("the token is not valid" if has_token else "no token is set"),
            f"accept it on {page}, then `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"the model {name!r} has no revision {revision or 'main'!r}",
            "the hub knows the model, and no branch, tag or commit of that name",
            f"see {page}/tree/main for its branches and tags, or leave the revision out",
        )
    # To a stranger the hub says 401 of what is private and of what does not exist.
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not has_token):
        why = (
            "your token may not see it, if it is private" if has_token else "or it is private and you are not logged in"
        )
        return ModelError(f"there is no model {name!r} on the hub", why, suggestion)
    if isinstance(error, HFValidationError):
        return ModelError(f"the hub can have no model called {name[:80]!r}", _first_line(error), suggestion)
    if status in (401, 403):
        return ModelError(
            f"the hub does not let you read the model {name!r}",
            _first_line(error) if has_token else "it wants a token, and none is set",
            "`hf auth login` with a token that may read it, or set HF_TOKEN",
        )
    if status == 429:
        return ModelError(
            f"the hub would not answer about the model {name!r}",
            "too many requests came from here (429)",
            "wait some minutes; with a token (`hf auth login`) more are allowed",
        )
    if status is not None and status >= 500:
        return ModelError(
            f"the hub cannot answer about the model {name!r} now",
            f"it says {status}",
            "try again in some minutes",
        )
    if isinstance(error, TimeoutError) or any(c.__name__ == "TimeoutException" for c in type(error).__mro__):
        return ModelError(
            f"the model {name!r} is not on this machine, and the hub is too slow, or its answers break off",
            f"{constants.ENDPOINT} had not answered in time: {constants.HF_HUB_ETAG_TIMEOUT} s for a question, and"
            f" {3 * (constants.HF_HUB_ETAG_TIMEOUT + constants.HF_HUB_DOWNLOAD_TIMEOUT)} s for all of it",
            f"try again, or allow more seconds with HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT; or {suggestion}",
        )
    return ModelError(
        f"the model {name!r} is not on this machine, and the hub could not be asked",
        f"{constants.ENDPOINT}: {_first_line(error)}",
        f"check the network; or {suggestion}",
    )


def _first_line(error: BaseException) -> str:
    """Return what an error says in one line, the hub's own words before those of a library."""
    text = getattr(error, "server_message", None) or str(error)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0].strip()[:200] if lines else type(error).__name__
