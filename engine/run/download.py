"""Bring a model's weights onto this machine: exactly the files that are loaded, and none before all are known to come.

Access and room are looked at first, by questions that cost no file. Then the weights come through huggingface_hub's own
`http_get` into files that are kept when anything ends it: huggingface_hub 2.4 resumes a connection that breaks, and
throws away what it has when its process is interrupted (`file_download.py`, `_download_to_tmp_and_move`). What is
complete is put where huggingface_hub looks for it, and huggingface_hub itself does the rest, which is small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import facts, paths
from engine.errors import FileError, ModelError
from engine.facts import catalogue, directory, hub, integrity, weights
from engine.facts.model import WITHOUT_WEIGHTS, Model
from engine.run.progress import Progress
from engine.units import format_seconds, format_size
from engine.values import Request

AT_ONCE = 4
"""Files that come at the same time: one connection seldom fills a line."""
MAX_FILES = 10_000
MAX_TIMES_SENT = 3
"""How often a file's bytes may come in all. A server that breaks off and never goes on would send them for ever."""
PARTIAL = ".dg-run.incomplete"
_ETAG = re.compile(r"[\w.-]{1,128}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
# What lies beside weights, and is neither weights nor read.
_NOT_READ = (
    ".safetensors",
    *weights.PICKLES,
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".pb",
    ".gguf",
    ".xml",
    ".tflite",
)
_NOT_READ_EITHER = (".py", ".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4")
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_DO = "give a directory in diffusers layout, or OWNER/MODEL as it stands on the hub"


@dataclass(frozen=True, slots=True)
class Local:
    """A model whose files are all here: its folder is `model.path`."""

    model: Model
    variant: str | None
    """The set of weights that is loaded, where a component has it; None is the plain one."""

    @property
    def folder(self) -> Path:
        """The folder it is loaded from."""
        assert self.model.path is not None
        return self.model.path


@dataclass(frozen=True, slots=True)
class File:
    """A file of a repository that is not here yet."""

    path: str
    size_bytes: int
    etag: str

    @property
    def component(self) -> str:
        """The component that it belongs to; "" for one of the model as a whole."""
        return self.path.rpartition("/")[0]


def local(request: Request, dtype: str, told: Progress) -> Local:
    """Return a request's model with all its files on this machine, fetched where they are not; loaded in `dtype`.

    Raises: ModelError, saying what is missing, refused or damaged; FileError, when there is no room for it.
    """
    model = facts.find(request.model, request.revision)
    absent = request.components
    if model.source not in ("embedded", "directory") and not _is_whole(model, dtype, absent):
        model = _fetched(model, request.revision, dtype, absent, told)
    variant = integrity.variant(model, dtype, absent)
    integrity.check(model, absent, variant)
    return Local(model, variant)


def _is_whole(model: Model, dtype: str, absent: Collection[str]) -> bool:
    """Return whether the cache holds all that is loaded of a model. Raises: ModelError, when not and offline."""
    because = "its configurations are all that is here"
    if model.path is not None:
        try:
            integrity.check(model, absent, integrity.variant(model, dtype, absent))
            because = _lacking(model, dtype, absent)
        except ModelError as error:
            because = error.why
        if not because:
            return True
    if hub.is_offline():
        raise ModelError(
            f"the weights of {model.id} are not on this machine",
            f"HF_HUB_OFFLINE is set, and {because}",
            "unset HF_HUB_OFFLINE and run again, or give a directory that holds the model",
        )
    return False


def _lacking(model: Model, dtype: str, absent: Collection[str]) -> str:
    """Return what the cache lacks of a model whose list of files it holds; "" for nothing, or without a list."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    assert model.path is not None
    try:
        listed = get_cached_repo_tree(model.id, revision=model.revision, cache_dir=paths.hub_cache_dir())
    except (CachedRepoTreeNotFoundError, OSError, ValueError):
        return ""
    gone = [f for f in needed(model, [f.path for f in listed], dtype, absent) if not (model.path / f).is_file()]
    return f"{gone[0]} is missing" if gone else ""


def needed(model: Model, names: Collection[str], dtype: str, absent: Collection[str] = ()) -> list[str]:
    """Return those files of a repository that loading a model in `dtype` reads.

    Raises: ModelError, when a component's weights are not there in safetensors.
    """
    within = {
        n: [f.partition("/")[2] for f in names if f.startswith(f"{n}/")] for n in model.components if n not in absent
    }
    variant = weights.variant(within.values(), dtype)
    wanted = [directory.INDEX]
    for name, files in within.items():
        component = model.components[name]
        flat = [f for f in files if "/" not in f]
        own = weights.loaded(flat, variant, component.library) or weights.loaded(flat, None, component.library)
        if not own and not component.cls.endswith(WITHOUT_WEIGHTS):
            raise _without_weights(model, name, flat)
        beside = [
            f
            for f in flat
            if not f.lower().endswith((*_NOT_READ, *_NOT_READ_EITHER)) and ".index." not in f and not f.startswith(".")
        ]
        wanted += [f"{name}/{f}" for f in sorted({*beside, *own})]
    return wanted


def _without_weights(model: Model, name: str, files: Sequence[str]) -> ModelError:
    pickled = sorted(f for f in files if f.endswith(weights.PICKLES))
    if pickled:
        return ModelError(
            f"the weights of {model.id} are not in safetensors",
            f"its repository has {name}/{pickled[0]}, a pickle, which can run code when it is loaded",
            "take a model in safetensors; many have a branch that is: --model OWNER/MODEL@BRANCH",
        )
    return ModelError(
        f"the model {model.id} has no weights for its component {name!r}",
        "its repository holds none that diffusers would load",
        "look at the model's page, or take another model",
    )


def _fetched(model: Model, revision: str | None, dtype: str, absent: Collection[str], told: Progress) -> Model:
    """Return a model of the hub, its files fetched into the cache. Raises: ModelError, FileError."""
    name, cache = model.id, paths.hub_cache_dir()
    with told.stage(f"asking the hub for {name}"):
        if model.source == "catalogue":  # what the repository itself says of its components, and of its commit
            model = dataclasses.replace(hub.fetch(name, _DO, cache, revision), defaults=model.defaults)
        assert model.revision is not None
        repository = Repository(name, model.revision, cache)
        with hub.telling(name, revision, _DO):
            files = repository.missing(needed(model, repository.names(), dtype, absent))
    repository.refuse_without_room(files)
    if files:
        _say(name, files, repository, told)
        repository.fetch(files, told)
    folder = repository.folder
    return directory.read(
        folder, name, source="cache", revision=folder.name, defaults=model.defaults or catalogue.defaults(name)
    )


def _say(name: str, files: Sequence[File], repository: Repository, told: Progress) -> None:
    have = sum(map(repository.have_bytes, files))
    whole = sum(f.size_bytes for f in files)
    here = f", of which {format_size(have)} are here already" if have else ""
    told.say(f"downloading {name}: {format_size(whole)} in {len(files)} files{here}, to {repository.cache}")


class Repository:
    """A model's repository at one commit, and where the cache keeps it."""

    def __init__(self, name: str, commit: str, cache: Path) -> None:
        self.name, self.commit, self.cache = name, commit, cache
        self._home = cache / f"models--{name.replace('/', '--')}"
        self.folder = self._home / "snapshots" / commit

    def names(self) -> list[str]:
        """Return the files that the repository has. Raises: what huggingface_hub does."""
        from huggingface_hub import HfApi, constants

        def ask() -> list[str]:
            info = HfApi().model_info(self.name, revision=self.commit, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return [s.rfilename for s in info.siblings or ()]

        names: list[str] = hub.together([ask], _deadline())[0]
        if len(names) > MAX_FILES:
            raise ValueError(f"its repository lists {len(names):,} files")
        return names

    def missing(self, names: Sequence[str]) -> list[File]:
        """Return those files that the cache lacks. Each is asked for by its head, so that access to it is known.

        Raises: what huggingface_hub does.
        """
        lacking = [n for n in names if not (self.folder / n).is_file()]
        until = _deadline()
        found: list[File] = []
        for begin in range(0, len(lacking), 8):
            jobs = [functools.partial(self._described, n) for n in lacking[begin : begin + 8]]
            found += hub.together(jobs, until)
        return found

    def _described(self, path: str) -> File:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.name, path, revision=self.commit)
        told = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if told.size is None or told.size < 0 or not _ETAG.match(told.etag or ""):
            raise ValueError(f"the hub does not say the size of {path}")
        return File(path=path, size_bytes=told.size, etag=str(told.etag))

    def blob(self, file: File) -> Path:
        """Return where huggingface_hub keeps a file's content."""
        return self._home / "blobs" / file.etag

    def partial(self, file: File) -> Path:
        """Return where a file is that is not here as a whole."""
        return self._home / "blobs" / f"{file.etag}{PARTIAL}"

    def have_bytes(self, file: File) -> int:
        """Return how much of a file is here."""
        for path in (self.blob(file), self.partial(file)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size_bytes)
        return 0

    def refuse_without_room(self, files: Sequence[File]) -> None:
        """Raises: FileError, when the disk of the cache cannot take what is still to come of these files."""
        wanted = sum(f.size_bytes - self.have_bytes(f) for f in files)
        place = next(p for p in (self.cache, *self.cache.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if wanted > free:
            raise FileError(
                f"there is no room for the model {self.name}",
                f"{format_size(wanted)} are to be downloaded to {self.cache}, and {format_size(free)} are free there",
                f"free {format_size(wanted - free)}, or name a folder on another disk: HF_HOME=DIR",
            )
        if wanted and not os.access(place, os.W_OK):
            raise FileError(
                f"the model {self.name} cannot be downloaded",
                f"{place} cannot be written",
                "name another folder: HF_HOME=DIR",
            )

    def fetch(self, files: Sequence[File], told: Progress) -> None:
        """Fetch files: small ones first, so that where the weights lie all lies. Raises: ModelError, FileError."""
        from huggingface_hub import constants

        hub.keep_quiet()
        heavy = [f for f in files if f.path.endswith(".safetensors")]
        with _telling(self, files), _Shown(files, self, told) as shown:
            _in_threads([(f, functools.partial(self._link, f, shown)) for f in files if f not in heavy], shown)
            # What is too large for plain HTTP is left to huggingface_hub's own way, which keeps no part of a file.
            plain = [f for f in heavy if f.size_bytes <= constants.MAX_HTTP_DOWNLOAD_SIZE]
            _in_threads([(f, functools.partial(self._get, f, shown)) for f in plain], shown)
            _in_threads([(f, functools.partial(self._link, f, shown)) for f in heavy], shown)

    def _link(self, file: File, shown: _Shown) -> None:
        """Let huggingface_hub put a file into the snapshot, and fetch it where it is not here."""
        from huggingface_hub import constants, hf_hub_download

        hf_hub_download(
            self.name,
            file.path,
            revision=self.commit,
            cache_dir=self.cache,
            etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
            tqdm_class=shown.bar(file),
        )
        shown.done(file)

    def _get(self, file: File, shown: _Shown) -> None:
        """Fetch a file's content, going on where it was left."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils._fixes import WeakFileLock
        from huggingface_hub.utils._headers import build_hf_headers

        blob, partial = self.blob(file), self.partial(file)
        locks = self.cache / ".locks" / self._home.name
        locks.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{file.etag}.lock"):
            if blob.is_file():
                return
            with partial.open("ab") as stream:
                if (have := stream.tell()) > file.size_bytes:
                    stream.truncate(have := 0)
                http_get(
                    hf_hub_url(self.name, file.path, revision=self.commit),
                    stream,
                    resume_size=have,
                    headers=build_hf_headers(),
                    expected_size=file.size_bytes,
                    displayed_filename=file.path,
                    tqdm_class=shown.bar(file),
                )
            if have and _SHA256.match(file.etag) and _sha256(partial, shown) != file.etag:
                partial.unlink()
                raise ModelError(
                    f"the download of {self.name} is damaged",
                    f"{file.path} is not what the hub has, and was put together of two tries",
                    "run again: the file is fetched anew",
                )
            partial.replace(blob)


def _deadline() -> float:
    from huggingface_hub import constants

    return time.monotonic() + 3 * (constants.HF_HUB_ETAG_TIMEOUT + constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _sha256(path: Path, shown: _Shown) -> str:
    found = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(8 * 1024**2):
            shown.refuse_stopped()
            found.update(piece)
    return found.hexdigest()


@contextlib.contextmanager
def _telling(repository: Repository, files: Sequence[File]) -> Iterator[None]:
    """Say what broke a download off, and what is kept of it. Raises: ModelError, FileError."""
    from huggingface_hub.errors import HfHubHTTPError

    name = repository.name
    try:
        yield
    except HfHubHTTPError as error:
        with hub.telling(name, None, _DO):
            raise error
    except (OSError, hub.transport(), ValueError, LookupError, TypeError, AssertionError) as error:
        have = format_size(sum(map(repository.have_bytes, files)))
        if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_A_DISK):
            raise FileError(
                f"the download of {name} cannot be written",
                " ".join(str(error).split())[:300],
                f"make room in {repository.cache}, or name another folder: HF_HOME=DIR; {have} are kept",
            ) from None
        raise ModelError(
            f"the download of {name} broke off",
            " ".join(str(error).split())[:300] or type(error).__name__,
            f"run again: {have} are kept, and it goes on from there",
        ) from None


class _Stopped(Exception):
    """Ends what is done in a thread, since the run is ended."""


class _Shown:
    """What is seen of a download: a bar of bytes on a terminal, a line a component elsewhere."""

    def __init__(self, files: Sequence[File], repository: Repository, told: Progress) -> None:
        self._told, self._repository = told, repository
        self._left: dict[str, set[str]] = {}
        self._bytes: dict[str, int] = {}
        for file in files:
            self._left.setdefault(file.component, set()).add(file.path)
            self._bytes[file.component] = self._bytes.get(file.component, 0) + file.size_bytes
        self._count, self._began = len(files), time.perf_counter()
        self._whole = sum(f.size_bytes for f in files)
        self._have = sum(map(repository.have_bytes, files))
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._bar: Any = None

    def __enter__(self) -> _Shown:
        if self._told.bars():
            from tqdm import tqdm

            self._bar = tqdm(total=self._whole, initial=self._have, unit="B", unit_scale=True, desc="downloading")
            self._bar.set_postfix_str(f"0/{self._count} files")
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._bar is not None:
            self._bar.close()

    def stop(self) -> None:
        """Let every thread end at its next piece."""
        self._stopped.set()

    def refuse_stopped(self) -> None:
        """Raises: _Stopped, once it is."""
        if self._stopped.is_set():
            raise _Stopped

    def done(self, file: File) -> None:
        """Tell that a file lies where it is loaded from."""
        with self._lock:
            left = self._left[file.component]
            left.discard(file.path)
            if self._bar is not None:
                count = self._count - sum(map(len, self._left.values()))
                self._bar.set_postfix_str(f"{count}/{self._count} files")
            elif not left:
                size = format_size(self._bytes[file.component])
                took = format_seconds(time.perf_counter() - self._began)
                self._told.say(f"  {file.component or 'the model'}: {size} here after {took}")

    def bar(self, file: File) -> Any:
        """Return the class of a bar for a file's bytes, as huggingface_hub wants it."""
        shown = self

        class Bar:
            def __init__(self, *_: Any, **__: Any) -> None:
                self.seen = 0

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def close(self) -> None:
                return None

            def update(self, n: float | None = 1) -> None:
                shown.refuse_stopped()
                came = int(n or 0)
                self.seen += max(0, came)
                if self.seen > MAX_TIMES_SENT * file.size_bytes + 2**20:
                    raise ValueError(f"the hub sends {file.path} again and again, and never the whole of it")
                if shown._bar is not None:
                    with shown._lock:
                        shown._bar.update(came)

            def __getattr__(self, name: str) -> Any:
                if name.startswith("set_"):
                    return lambda *_, **__: None
                raise AttributeError(name)

        return Bar


def _in_threads(jobs: Sequence[tuple[File, Any]], shown: _Shown) -> None:
    """Do jobs, some at a time. Raises what the first to fail raised, once no other one works any more.

    The threads are daemons: one that waits for the network does not keep an interrupted run from ending.
    """
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for _, job in jobs:
        todo.put(job)

    def work() -> None:
        while not shown._stopped.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                job()
                done.put(None)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                done.put(error)
                return

    names = (f"{hub.THREADS}-{n}" for n in range(min(AT_ONCE, len(jobs))))
    threads = [threading.Thread(target=work, daemon=True, name=name) for name in names]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            if (error := done.get()) is not None:
                raise error
    except BaseException:
        shown.stop()
        until = time.monotonic() + 2
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
