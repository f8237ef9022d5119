"""Models on the hub, through huggingface_hub itself, against a server on loopback: as `dg-run plan` meets them.

huggingface_hub reads its environment when it is imported, so every case is a process of its own. They run beside each
other before the first test, because several of them wait.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engine import facts, paths
from engine.errors import ModelError
from tests import hub_server
from tests.hub_server import COMMITS, Hub, Repository

MEMBER, STRANGER = "hf_member", "hf_stranger"
SMALL_BYTES = 64 * 1024
QUICK = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def _whole() -> dict[str, bytes]:
    folder = paths.embedded_model_dir()
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


WHOLE = _whole()
# Weights are there to be asked for, and are none.
TINY = {n: b"weights" * 100_000 if n.endswith(".safetensors") else f for n, f in WHOLE.items()}
INDEX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


def _hostile(**files: Any) -> dict[str, bytes]:
    return {name.replace("__", "/") + ".json": json.dumps(text).encode() for name, text in files.items()}


REPOSITORIES = {
    "tiny/model": Repository(files=TINY),
    "tiny/whole": Repository(files=WHOLE),
    "tiny/gated": Repository(files=TINY, members=frozenset({MEMBER})),
    "old/name": Repository(renamed="tiny/model"),
    "slow/description": Repository(files=TINY, api_waits_s=30),
    "slow/files": Repository(files=TINY, drips_s=0.2),
    "cut/description": Repository(files=TINY, api_cut=True),
    "cut/once": Repository(files=TINY, cuts=1),
    "cut/always": Repository(files=TINY, cuts=10**9, resumes=False),
    "broken/hub": Repository(files=TINY, api_status=503),
    "busy/hub": Repository(files=TINY, api_status=429),
    "other/server": Repository(files=TINY, api_text="<html>Sign in to this network</html>"),
    "other/json": Repository(files=TINY, api_text="[]"),
    "no/pipeline": Repository(files={"config.json": b"{}", "model.safetensors": b"weights"}),
    "too/large": Repository(files=TINY, says_bytes=10**10),
    "evil/library": Repository(files=_hostile(model_index=INDEX | {"vae": ["os", "System"]}, transformer__config={})),
    "evil/layers": Repository(files=_hostile(model_index=INDEX, transformer__config={"num_layers": 10**9})),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked for, in which environment, and what must be in the answer. Refused unless a plan comes out."""

    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    says: tuple[str, str, str] | None = None
    """What must be in what happened, why, and what to do: regular expressions."""
    revision: str | None = None
    """The commit of the plan, where one must come out."""


CASES = {
    "found": Case(model="tiny/model", revision=COMMITS["main"]),
    "tag": Case(model="tiny/model@v1", revision=COMMITS["v1"]),
    "commit": Case(model=f"tiny/model@{COMMITS['v1']}", revision=COMMITS["v1"]),
    "renamed": Case(model="old/name", revision=COMMITS["main"]),
    "member": Case(model="tiny/gated", environment={"HF_TOKEN": MEMBER}, revision=COMMITS["main"]),
    "cut once": Case(model="cut/once", revision=COMMITS["main"]),
    "401": Case(model="tiny/gated", says=("is gated", "no token is set", "/tiny/gated, then `hf auth login`")),
    "403": Case(
        model="tiny/gated",
        environment={"HF_TOKEN": STRANGER},
        says=("your token has no access", "not among those that the owner let in", "ask for access on http"),
    ),
    "401 stale": Case(
        model="tiny/model",
        environment={"HF_TOKEN": "stale"},
        says=("does not let you read", "Invalid credentials", "`hf auth login`"),
    ),
    "404": Case(
        model="nobody/flux1-dev",
        environment={"HF_TOKEN": MEMBER},
        says=("there is no model 'nobody/flux1-dev'", "your token may not see it", "did you mean .*FLUX.1-dev"),
    ),
    "404 stranger": Case(model="nobody/nothing", says=("there is no model", "you are not logged in", "OWNER/MODEL")),
    "404 revision": Case(
        model="tiny/model@nope", says=("has no revision 'nope'", "no branch, tag or commit", "leave the revision out")
    ),
    "bad name": Case(model="tiny/mo--del", says=("can have no model called", "--", "OWNER/MODEL")),
    "slow": Case(
        model="slow/description",
        environment=QUICK,
        says=("too slow", "1 s for a question", "HF_HUB_ETAG_TIMEOUT"),
    ),
    "slow files": Case(
        model="slow/files", environment=QUICK, says=("too slow", "6 s for all of it", "HF_HUB_ETAG_TIMEOUT")
    ),
    "cut always": Case(
        model="cut/always", environment=QUICK, says=("and the hub", "closed|disconnected|6 s for all", "network|again")
    ),
    "cut description": Case(model="cut/description", says=("could not be asked", "closed", "check the network")),
    "down": Case(
        model="tiny/down",
        environment={"HF_ENDPOINT": "down"},
        says=("could not be asked", "refused", "check the network"),
    ),
    "503": Case(model="broken/hub", says=("cannot answer", "503", "try again")),
    "429": Case(model="busy/hub", says=("would not answer", "429", "wait")),
    "no hub": Case(model="other/server", says=("could not be asked", "127.0.0.1", "check the network")),
    "no hub either": Case(model="other/json", says=("could not be asked", "127.0.0.1", "check the network")),
    "no pipeline": Case(model="no/pipeline", says=("is not a diffusers pipeline", "no model_index.json", "layout")),
    "too large": Case(model="too/large", says=("not a model's configuration", "10,000,000,000 bytes", "page")),
    "hostile library": Case(
        model="evil/library", says=("not part of diffusers or transformers", '"os".*is not run', "use a model")
    ),
    "hostile layers": Case(
        model="evil/layers", says=("cannot be a model's", "num_layers is 1,000,000,000, and no model", "from whom")
    ),
    "offline": Case(
        model="tiny/offline",
        environment={"HF_HUB_OFFLINE": "1"},
        says=("not on this machine", "HF_HUB_OFFLINE is set", "give a directory"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a process did."""

    code: int
    out: str
    err: str
    seconds: float
    home: Path


def _ask(model: str, home: Path, environment: Mapping[str, str], job: Sequence[str] = ("plan", "--json")) -> Answer:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "engine", *job, "--model", model],
        env={**kept, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "DG_RUN_CACHE": str(home / "dg"), **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Answer(code=done.returncode, out=done.stdout, err=done.stderr, seconds=time.monotonic() - started, home=home)


def _closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.running(REPOSITORIES) as server:
        yield server


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    """What every case came to."""
    folder = tmp_path_factory.mktemp("hub")

    def ask(name: str) -> Answer:
        case = CASES[name]
        environment = {"HF_ENDPOINT": hub.url, **case.environment}
        if environment["HF_ENDPOINT"] == "down":
            environment["HF_ENDPOINT"] = _closed_port()
        return _ask(case.model, folder / name, environment)

    longest_first = sorted(CASES, key=lambda name: CASES[name].environment is not QUICK)
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(longest_first, pool.map(ask, longest_first), strict=True))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.revision])
def test_a_model_is_found(name: str, answers: Mapping[str, Answer]) -> None:
    answer = answers[name]
    assert answer.code == 0, answer.err
    request = json.loads(answer.out)["request"]
    assert (request["model"], request["revision"]) == (CASES[name].model.partition("@")[0], CASES[name].revision)
    assert request["pipeline_class"] == "FluxPipeline"


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.revision])
def test_what_is_not_found_is_said_in_three_parts(name: str, answers: Mapping[str, Answer]) -> None:
    answer = answers[name]
    assert answer.code == 5, answer.err
    assert "Traceback" not in answer.err
    told = answer.err.splitlines()
    assert [line[:6] for line in told] == ["dg-run", "  why:", "  do: "], answer.err
    for pattern, line in zip(CASES[name].says or (), told, strict=True):
        assert re.search(pattern, line), answer.err
    # Ten times what it takes alone; the server would keep a patient client for half a minute, or for ever.
    assert answer.seconds < 25


@pytest.mark.parametrize("repository", ["tiny/model", "tiny/gated", "cut/once"])
def test_only_configurations_are_asked_for(repository: str, answers: Mapping[str, Answer], hub: Hub) -> None:
    asked = set(hub.paths(repository))
    wanted = {"model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"}
    assert wanted <= asked
    assert {p.rpartition("/")[2] for p in asked} <= {"", "model_index.json", "config.json", "scheduler_config.json"}


def test_no_weights_are_asked_for_by_anything(answers: Mapping[str, Answer], hub: Hub) -> None:
    assert len(answers) == len(CASES)
    assert len(hub.asked) > 100
    assert [p for n, p in hub.asked if n and p and not p.endswith(".json")] == []


def test_a_few_kilobytes_are_enough(answers: Mapping[str, Answer], hub: Hub) -> None:
    for repository in ("tiny/gated", "cut/once", "old/name", "too/large"):
        assert hub.sent[repository] < SMALL_BYTES, repository
    # Asked for by four processes that had nothing.
    assert 0 < hub.sent["tiny/model"] < 4 * SMALL_BYTES


def test_offline_nothing_is_asked(answers: Mapping[str, Answer], hub: Hub) -> None:
    assert answers["offline"].code == 5
    assert hub.paths("tiny/offline") == []


def test_what_was_fetched_is_known_without_the_hub(answers: Mapping[str, Answer], hub: Hub) -> None:
    """By its name, and by its tag, and offline: and that it is configurations alone is known too."""
    before = len(hub.asked)
    found = _ask("tiny/model", answers["found"].home, {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"})
    tagged = _ask("tiny/model@v1", answers["tag"].home, {"HF_ENDPOINT": hub.url, "TRANSFORMERS_OFFLINE": "1"})
    assert [json.loads(a.out)["request"]["revision"] for a in (found, tagged)] == [COMMITS["main"], COMMITS["v1"]]
    assert len(hub.asked) == before


def test_facts_from_the_cache_are_those_of_the_directory(
    answers: Mapping[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(answers["found"].home / "hub"))
    model = facts.find("tiny/model")
    assert (model.source, model.revision, model.path) == ("cache", COMMITS["main"], None)
    truth = facts.find(None)
    assert {n: (c.cls, c.config) for n, c in model.components.items()} == {
        n: (c.cls, c.config) for n, c in truth.components.items()
    }
    # Weights are not asked for, so what precision they are stored in is what the configuration says, if it does.
    assert truth.components["transformer"].stored_dtype == "float16"
    assert model.components["transformer"].stored_dtype is None
    assert model.components["text_encoder"].stored_dtype == model.components["text_encoder"].config["dtype"]


def test_a_snapshot_that_lacks_a_configuration_is_not_taken_for_whole(
    answers: Mapping[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(answers["renamed"].home / "hub"))
    assert facts.find("old/name").source == "cache"
    (answers["renamed"].home / "hub/models--old--name/snapshots" / COMMITS["main"] / "vae/config.json").unlink()
    with pytest.raises(ModelError, match=r"the configuration of its component 'vae' .* is missing"):
        facts.find("old/name")


def test_a_download_that_failed_leaves_nothing_that_looks_whole(answers: Mapping[str, Answer]) -> None:
    for name in ("cut always", "slow files", "403", "too large"):
        snapshots = answers[name].home / "hub"
        assert list(snapshots.rglob("model_index.json")) == []


@pytest.mark.parametrize("revision", ["../../main", "a/../../b", "-x", ""])
def test_a_revision_that_leaves_the_cache_is_no_name(revision: str) -> None:
    with pytest.raises(ModelError):
        facts.find(f"tiny/model@{revision}")


@pytest.mark.slow
def test_a_model_that_was_planned_is_then_downloaded_and_drawn_with(hub: Hub, tmp_path: Path) -> None:
    """That the cache holds its configurations alone must not be taken for a download that was cut off."""
    online = {"HF_ENDPOINT": hub.url}
    planned = _ask("tiny/whole", tmp_path, online)
    assert planned.code == 0, planned.err
    assert not any(p.endswith(".safetensors") for p in hub.paths("tiny/whole"))
    picture = tmp_path / "out.png"
    job = (
        "--auto",
        "--device",
        "cpu",
        "--prompt",
        "a red circle",
        "--num_inference_steps",
        "1",
        "--output",
        str(picture),
    )
    drawn = _ask("tiny/whole", tmp_path, online, job)
    assert drawn.code == 0, drawn.err
    assert picture.stat().st_size > 0
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.paths("tiny/whole")
