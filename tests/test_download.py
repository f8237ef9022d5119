"""Downloads, against a hub on loopback that breaks off, refuses, drips and lies. Nothing here starts torch.

huggingface_hub reads its environment when it is imported, so every case is a process of its own, which fetches a model
and says where it lies.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine import facts, paths
from engine.errors import FileError, ModelError
from engine.run import download
from engine.run.progress import Quiet
from engine.values import Request
from tests import hub_server
from tests.hub_server import COMMITS, Hub, Repository
from tests.test_hub import MEMBER, SMALL_BYTES, WHOLE

FETCH = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 64 * 1024  # what is kept of a file is kept in such pieces, of 10 MiB usually
from engine.errors import DgRunError
from engine.run import download
from engine.run.progress import OnStderr
from engine.values import Request
try:
    found = download.local(Request(model=sys.argv[1]), sys.argv[2], OnStderr())
except DgRunError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
print(found.folder, found.variant)
"""
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def _with_variant(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return a repository as many are: pickles, a whole model at its top, and the weights in a second precision."""
    more = {"flux1.safetensors": b"all" * 10_000, "README.md": b"#", "vae/diffusion_pytorch_model.bin": b"pickle" * 999}
    halved = {n.replace(".safetensors", ".fp16.safetensors"): f for n, f in files.items() if n.endswith(".safetensors")}
    return {**files, **more, **halved, "transformer/picture.png": b"png"}


def _pickled() -> dict[str, bytes]:
    return {
        (n[:-11] + "bin" if n.startswith("vae/") and n.endswith(".safetensors") else n): f for n, f in WHOLE.items()
    }


REPOSITORIES = {
    "tiny/whole": Repository(files=WHOLE),
    "tiny/cut": Repository(files=WHOLE, cuts=7),
    "tiny/drip": Repository(files=WHOLE),
    "tiny/never": Repository(files=WHOLE, cuts=10**9, resumes=False),
    "tiny/gated": Repository(files=WHOLE, members=frozenset({MEMBER})),
    "tiny/variants": Repository(files=_with_variant(WHOLE)),
    "tiny/pickled": Repository(files=_pickled()),
    "tiny/lora": Repository(files={"README.md": b"#", "scene.safetensors": b"of a LoRA"}),
    "tiny/huge": Repository(files=WHOLE, says_bytes=2**60),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server.running(REPOSITORIES) as server:
        yield server


def _start(
    hub: Hub, home: Path, model: str, dtype: str = "float32", job: str = FETCH, **environment: str
) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "DG_RUN_CACHE": str(home / "dg")}
    return subprocess.Popen(
        [sys.executable, "-c", job, model, dtype],
        env={**kept, **own, **environment},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _fetch(hub: Hub, home: Path, model: str, dtype: str = "float32", **environment: str) -> tuple[int, str, str]:
    process = _start(hub, home, model, dtype, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.strip(), err


def _weights(home: Path) -> list[Path]:
    return [p for p in home.rglob("*.safetensors") if p.is_file()]


@pytest.fixture(scope="module")
def whole(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A home into which a model was fetched, and what was said of it."""
    home = tmp_path_factory.mktemp("whole")
    code, out, err = _fetch(hub, home, "tiny/whole")
    assert code == 0, err
    return home, out, err


def test_a_model_is_fetched_whole_once_and_then_never_asked_for_again(hub: Hub, whole: tuple[Path, str, str]) -> None:
    home, out, err = whole
    folder = Path(out.partition(" ")[0])
    assert {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} == set(WHOLE)
    assert (folder / TRANSFORMER).read_bytes() == WHOLE[TRANSFORMER]
    told = err.splitlines()
    assert any(line.startswith("downloading tiny/whole: ") and "files" in line for line in told), err
    for component in ("transformer", "vae", "text_encoder_2", "tokenizer"):
        assert any(line.strip().startswith(f"{component}: ") for line in told), err
    before = len(hub.asked)
    assert _fetch(hub, home, "tiny/whole")[:2] == (0, out)
    assert _fetch(hub, home, "tiny/whole", HF_HUB_OFFLINE="1")[:2] == (0, out)
    assert len(hub.asked) == before
    assert list(home.rglob("*.incomplete")) == []


def test_the_two_of_them_agree_on_what_is_whole(whole: tuple[Path, str, str]) -> None:
    """What is fetched here is what huggingface_hub takes for cached: its own tools find it."""
    home, out, _ = whole
    ask = "import sys, huggingface_hub as h; print(h.hf_hub_download(*sys.argv[1:3], local_files_only=True))"
    done = subprocess.run(
        [sys.executable, "-c", ask, "tiny/whole", TRANSFORMER],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.strip() == str(Path(out.partition(" ")[0]) / TRANSFORMER), done.stderr
    assert json.loads((Path(out.partition(" ")[0]) / "model_index.json").read_text())["_class_name"] == "FluxPipeline"


def test_a_file_that_went_from_the_cache_is_fetched_alone(hub: Hub, whole: tuple[Path, str, str]) -> None:
    home, out, _ = whole
    lost = Path(out.partition(" ")[0]) / TRANSFORMER
    lost.resolve().unlink()
    lost.unlink()
    code, _, err = _fetch(hub, home, "tiny/whole", HF_HUB_OFFLINE="1")
    assert code == 5 and "HF_HUB_OFFLINE is set" in err and "transformer holds no weights" in err
    sent = hub.sent["tiny/whole"]
    assert _fetch(hub, home, "tiny/whole")[0] == 0
    assert 0 <= hub.sent["tiny/whole"] - sent - len(WHOLE[TRANSFORMER]) < 2048  # and its description


def test_connections_that_break_go_on_where_they_were(hub: Hub, tmp_path: Path) -> None:
    code, out, err = _fetch(hub, tmp_path, "tiny/cut")
    assert code == 0, err
    assert (Path(out.partition(" ")[0]) / TRANSFORMER).read_bytes() == WHOLE[TRANSFORMER]
    assert hub.repositories["tiny/cut"].cuts == 0
    assert hub.sent["tiny/cut"] < sum(map(len, WHOLE.values())) + SMALL_BYTES


@pytest.mark.slow
def test_a_hub_that_never_sends_the_whole_of_a_file_is_given_up(hub: Hub, tmp_path: Path) -> None:
    code, _, err = _fetch(hub, tmp_path, "tiny/never", HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1")
    assert code == 5 and "Traceback" not in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_what_was_interrupted_goes_on_where_it_was(hub: Hub, tmp_path: Path, how: signal.Signals) -> None:
    repository = hub.repositories["tiny/drip"]
    repository.drips_s, repository.drip_bytes = 0.05, 40_000
    wanted = {n: f for n, f in WHOLE.items() if n.endswith(".safetensors")}
    process = _start(hub, tmp_path, "tiny/drip")
    try:
        until = time.monotonic() + 30
        while sum(p.stat().st_size for p in tmp_path.rglob(f"*{download.PARTIAL}")) < 400_000:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (130, -signal.SIGKILL) and "Traceback" not in err
    kept = sum(p.stat().st_size for p in tmp_path.rglob(f"*{download.PARTIAL}"))
    assert kept >= 400_000
    repository.drips_s = 0.0
    before = -1
    while before != (before := hub.sent["tiny/drip"]):  # what it sends into the void until it sees that nobody is there
        time.sleep(0.3)
    code, out, err = _fetch(hub, tmp_path, "tiny/drip")
    assert code == 0, err
    assert "are here already" in err
    assert hub.sent["tiny/drip"] - before <= sum(map(len, wanted.values())) - kept + SMALL_BYTES
    folder = Path(out.partition(" ")[0])
    assert {n: (folder / n).read_bytes() == f for n, f in wanted.items()} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", ("is gated", "no token is set", "`hf auth login`")),
        ("hf_stranger", ("your token has no access", "not among those", "ask for access")),
        ("stale", ("does not let you read", "Invalid credentials", "a token that may read it")),
    ],
)
def test_access_is_looked_at_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, token: str, words: tuple[str, ...]
) -> None:
    """With the configurations here, as after a plan: no weights are asked for of who may not have them."""
    folder = tmp_path / "hub/models--tiny--gated/snapshots" / COMMITS["main"]
    for name, text in WHOLE.items():
        if name.endswith((".json", ".txt")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text)
    refs = tmp_path / "hub/models--tiny--gated/refs/main"
    refs.parent.mkdir()
    refs.write_text(COMMITS["main"])
    before = hub.sent["tiny/gated"]
    code, _, err = _fetch(hub, tmp_path, "tiny/gated", **({"HF_TOKEN": token} if token else {}))
    assert code == 5 and all(word in err for word in words), err
    assert hub.sent["tiny/gated"] - before < 2048 and _weights(tmp_path) == []


def test_room_is_looked_at_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in ("model_index.json", "transformer/config.json"):
        assert name in WHOLE
    folder = tmp_path / "hub/models--tiny--huge/snapshots" / COMMITS["main"]
    for name, text in WHOLE.items():
        if name.endswith(".json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text)
    refs = tmp_path / "hub/models--tiny--huge/refs/main"
    refs.parent.mkdir()
    refs.write_text(COMMITS["main"])
    code, _, err = _fetch(hub, tmp_path, "tiny/huge")
    assert code == FileError.exit_code, err
    assert "there is no room for the model tiny/huge" in err and "are free there" in err and "HF_HOME" in err
    assert _weights(tmp_path) == []


@pytest.mark.parametrize(("dtype", "variant"), [("float16", "fp16"), ("bfloat16", "None"), ("float32", "None")])
def test_one_precision_is_fetched_and_nothing_that_is_not_loaded(
    hub: Hub, tmp_path: Path, dtype: str, variant: str
) -> None:
    code, out, err = _fetch(hub, tmp_path, "tiny/variants", dtype)
    assert code == 0, err
    folder, _, said = out.partition(" ")
    assert said == variant
    fetched = {f.relative_to(folder).as_posix() for f in Path(folder).rglob("*") if f.is_file()}
    plain = set(WHOLE)
    halved = {n.replace(".safetensors", ".fp16.safetensors") for n in WHOLE}
    assert fetched == (halved if variant == "fp16" else plain)


def test_a_model_in_pickles_is_refused_by_name_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    code, _, err = _fetch(hub, tmp_path, "tiny/pickled")
    assert code == 5 and "tiny/pickled are not in safetensors" in err and "vae/diffusion_pytorch_model.bin" in err
    assert _weights(tmp_path) == []


def test_offline_is_said_by_its_name(hub: Hub, tmp_path: Path) -> None:
    code, _, err = _fetch(hub, tmp_path, "black-forest-labs/FLUX.1-schnell", HF_HUB_OFFLINE="1")
    assert code == 5 and "are not on this machine" in err and "unset HF_HUB_OFFLINE" in err
    assert hub.paths("black-forest-labs/FLUX.1-schnell") == []


LORA = "import sys; from engine.facts import loras; print(loras.located(sys.argv[1]))"


def test_the_one_lora_of_a_repository_is_fetched_and_found_again_offline(hub: Hub, tmp_path: Path) -> None:
    code, out, err = _fetch(hub, tmp_path, "tiny/lora", job=LORA)
    assert code == 0, err
    assert Path(out).read_bytes() == b"of a LoRA"
    before = len(hub.asked)
    assert _fetch(hub, tmp_path, "tiny/lora/scene.safetensors", job=LORA, HF_HUB_OFFLINE="1")[:2] == (0, out)
    assert len(hub.asked) == before


def _model() -> Any:
    return facts.find(None)


def test_a_component_that_is_left_out_is_not_needed() -> None:
    names = list(WHOLE)
    all_of_it = download.needed(_model(), names, "float32")
    fewer = download.needed(_model(), names, "float32", {"text_encoder_2": None})
    assert {n for n in all_of_it if n not in fewer} == {n for n in WHOLE if n.startswith("text_encoder_2/")}


def test_shards_come_with_their_index_and_without_the_whole_file_beside_them() -> None:
    names = [n for n in WHOLE if n != TRANSFORMER]
    stem = "transformer/diffusion_pytorch_model"
    shards = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names += [*shards, f"{stem}.safetensors.index.json", TRANSFORMER, f"{stem}.fp16.safetensors"]
    wanted = {n for n in download.needed(_model(), names, "bfloat16") if n.startswith("transformer/")}
    assert wanted == {*shards, f"{stem}.safetensors.index.json", "transformer/config.json"}
    halved = {n for n in download.needed(_model(), names, "float16") if n.startswith("transformer/")}
    assert halved == {f"{stem}.fp16.safetensors", "transformer/config.json"}


def test_a_component_without_any_weights_is_named() -> None:
    names = [n for n in WHOLE if not n.startswith("vae/diff")]
    with pytest.raises(ModelError, match="no weights for its component 'vae'"):
        download.needed(_model(), names, "float32")


def _gone(file: Path) -> None:
    file.unlink()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _scrambled(file: Path) -> None:
    body = file.read_bytes()
    file.write_bytes(body[:8] + b"{" * 40 + body[48:])


@pytest.mark.parametrize(
    ("spoil", "words"), [(_gone, "holds no weights"), (_cut, "where its header says"), (_scrambled, "damaged header")]
)
def test_what_happened_to_a_directory_since_it_was_planned_is_named_with_its_file(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(paths.embedded_model_dir(), folder)
    request = Request(model=str(folder))
    assert download.local(request, "float32", Quiet()).folder == folder
    spoil(folder / TRANSFORMER)
    with pytest.raises(ModelError, match=words) as caught:
        download.local(request, "float32", Quiet())
    assert "transformer" in str(caught.value) and caught.value.do
