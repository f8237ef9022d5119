"""Locks as values and files: the same bytes for the same request, and a sentence for every way to be damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine import lock, lockfile, plain, validation
from engine.errors import FileError, IncompatibleError, ModelError, NothingFitsError, UsageError
from engine.values import Driver, GpuProcess, Hardware
from tests.conftest import GIB, RTX_4090, card, machine, write
from tests.test_documents import BOMB

BFLOAT16 = {"name": "dtype", "params": {"value": "bfloat16"}}
SCHEMA = jsonschema.Draft202012Validator(json.loads(validation.schema_text("lock")))


def with_card(free_gib: float = 23.0, *, name: str = RTX_4090, index: int = 0) -> Hardware:
    """Return a machine with a card under a driver, and a neighbour on the card."""
    neighbour = GpuProcess(pid=17, name="python", used_bytes=GIB)
    seen = dataclasses.replace(card(free_gib, name=name, index=index), processes=(neighbour,))
    return dataclasses.replace(machine(seen), driver=Driver(version="580.65.06", cuda="13.0"))


def locked(**asked: Any) -> engine.Lock:
    return lock.of(engine.resolve(hardware=asked.pop("hardware", with_card()), **asked))


@pytest.fixture(scope="module")
def text() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield locked().text()


@pytest.mark.parametrize("kind", ["yaml", "json"])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"height": 256, "width": 192, "steps": 3, "batch": 2, "guidance": 3, "device": "cpu"},
        {"steps": 3, "require": ["vae_tiling"], "forbid": ["resident"]},
        {
            "device": "cpu",
            "call": {"b": 1e-7, "a": ["x", {"deep": None, "1e5": "no"}], "c": "ü \u2028 \U0001f600 \x00"},
        },
        {"optimizers": [BFLOAT16, "vae_tiling", {"name": "group_offload", "params": {"use_stream": False}}]},
        {"components": {"text_encoder_2": None}},
        {"device": "cpu", "hardware": machine()},
        {"model": "black-forest-labs/FLUX.1-dev", "vram": "20GiB", "host_ram": "64GiB"},
    ],
)
def test_a_lock_survives_its_file(tmp_path: Path, kind: str, asked: dict[str, Any]) -> None:
    hardware = asked.get("hardware", with_card())
    plan = engine.resolve(**(asked | {"hardware": hardware}))
    path = tmp_path / f"plan.{kind}"
    made = plan.lock(path)
    assert engine.read_lock(path) == made == engine.read_lock(str(path))
    assert made.plan_digest == plan.digest
    assert (made.optimizers, made.estimate.required_bytes) == (plan.optimizers, plan.estimate.required_bytes)
    SCHEMA.validate(json.loads(made.text("json")))
    assert path.read_text(encoding="utf-8") == made.text(kind)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**60), 2**60)
            | st.floats(allow_nan=False, allow_infinity=False)
            # A lone surrogate is no text that could be written.
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        ),
        max_size=3,
    )
)
def test_any_call_is_locked_in_yaml_as_in_json(call: dict[str, Any]) -> None:
    made = locked(call=call, device="cpu", hardware=machine())
    assert lock.parse(made.text("yaml"), "x", "yaml") == lock.parse(made.text("json"), "x", "json") == made


def test_two_locks_of_one_request_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    asked: dict[str, Any] = {"height": 128, "call": {"true_cfg_scale": 2.5, "max_sequence_length": 32}}
    engine.resolve(hardware=with_card(20.0), **asked).lock(first)
    other: dict[str, Any] = {"call": {"max_sequence_length": 32, "true_cfg_scale": 2.5}, "height": 128}
    engine.resolve(hardware=with_card(19.7, index=0), gpu=0, **other).lock(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_lock_names_no_card_no_process_and_no_host() -> None:
    seen = with_card()
    uuid = seen.gpus[0].uuid
    assert uuid is not None
    for kind in ("yaml", "json"):
        said = lock.of(engine.resolve(hardware=seen, gpu=uuid)).text(kind)
        for private in ("GPU-", "pid", "python", os.uname().nodename, str(Path.home()), str(seen.gpus[0].free_bytes)):
            assert private not in said


def test_the_request_of_a_lock_is_that_of_a_plan_without_the_card() -> None:
    plans, locks = (json.loads(validation.schema_text(n))["properties"]["request"] for n in ("plan", "lock"))
    assert {k: v for k, v in plans["properties"].items() if k != "gpu"} == locks["properties"]
    estimates = json.loads(validation.schema_text("plan"))["properties"]["estimate"]["properties"]
    for name, form in json.loads(validation.schema_text("lock"))["properties"]["estimate"]["properties"].items():
        assert form == estimates[name]


def test_a_lock_is_for_people(text: str) -> None:
    assert text.startswith("# A locked plan of dg-run")
    for line in (
        "dg-run --plan FILE --prompt",
        "dg-run plan --check FILE",
        "  - {name: dtype, params: {value: bfloat16}}",
    ):
        assert line in text
    assert re.search(r"\n  required_bytes: \d{9}  # 0\.\d\d GiB\n", text)


DAMAGED = {
    "a value": (("steps: 8", "steps: 4"), "digest does not match"),
    "an optimizer": (("name: resident", "name: model_offload"), "digest does not match"),
    "a size": (("required_bytes: ", "required_bytes: 1"), "digest does not match"),
    "what it stands on": (('torch: "2', 'torch: "1'), "digest does not match"),
    "a digest": (('\ndigest: "sha256:', '\ndigest: "sha256:0'), "is not a digest"),
    "another digest": (("plan_digest: ", "plan_digest: # "), "plan_digest"),
    "another version": (("dg-run/lock@1", "dg-run/lock@2"), "this version reads 'dg-run/lock@1'"),
    "a plan": (("dg-run/lock@1", "dg-run/plan@1"), "it is a plan as --json prints it"),
    "another file": (("schema: dg-run/lock@1", "schema: dg-run/profile@1"), "its schema is not 'dg-run/lock@1'"),
    "a key": (("\nestimate:", "\nestimat:"), "unknown key 'estimat'"),
    "a key twice": (("\nestimate:", "\nschema: dg-run/lock@1\nestimate:"), "is here twice"),
    "a type": (("batch: 1", "batch: one"), "is not a whole number"),
    "a tag": (("batch: 1", "batch: !!python/object:os.system 1"), "the tag"),
    "an anchor that is none": (("batch: 1", "batch: *one"), "undefined alias"),
    "a tab": (("  model: embedded", "\tmodel: embedded"), "never with tabs"),
    "a long number": (("batch: 1", f"batch: {'9' * 400}"), "this number is too long"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_lock_that_was_changed_is_refused(tmp_path: Path, text: str, name: str) -> None:
    (old, new), part = DAMAGED[name]
    assert old in text
    path = write(tmp_path, "plan.yaml", text.replace(old, new, 1))
    with pytest.raises(FileError) as caught:
        engine.read_lock(path)
    assert part in str(caught.value)
    assert "plan.yaml" in caught.value.what
    assert caught.value.do


def test_every_value_is_under_the_digest(text: str) -> None:
    content = lock.parse(text, "x").text("json")
    value = json.loads(content)

    def leaves(at: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        items = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        for key, inner in items:
            yield from leaves(inner, (*path, key))
        if not isinstance(at, dict | list):
            yield path

    for path in leaves(value):
        changed = json.loads(content)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        was = holder[path[-1]]
        holder[path[-1]] = "x" if isinstance(was, str) else 7 if was is None else not was if was is True else 41
        with pytest.raises(FileError):
            lock.parse(json.dumps(changed), "x", "json")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_lock_that_was_cut_off_is_refused(tmp_path: Path, text: str, kind: str, share: float) -> None:
    whole = lock.parse(text, "x").text(kind)
    path = write(tmp_path, f"plan.{kind}", whole[: int(len(whole) * share)])
    with pytest.raises(FileError):
        engine.read_lock(path)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "[" * 100_000,
        "\x00",
        "null",
        "[]",
        "- dg-run/lock@1",
        "schema: {a: 1}",
        "schema: [dg-run/lock@1]",
        "schema: 1",
        "a" * (1024**2 + 1),
        '{"schema": "dg-run/lock@1"}',
    ],
)
@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_what_is_no_lock_is_refused(tmp_path: Path, content: str, kind: str) -> None:
    with pytest.raises(FileError):
        engine.read_lock(write(tmp_path, f"plan.{kind}", content))


def test_deep_and_infinite_values_in_json_are_refused(text: str) -> None:
    whole = lock.parse(text, "x").text("json")
    for value in ("[" * 900 + "]" * 900, "NaN", "1e999", "-Infinity"):
        with pytest.raises(FileError):
            lock.parse(whole.replace('"max_sequence_length": 32', f'"max_sequence_length": {value}'), "x", "json")


def test_a_file_that_cannot_be_read_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, part in (
        ("folder.yaml", "that is a directory"),
        ("pipe.yaml", "that is not a file"),
        ("missing.json", "No such file"),
        ("a/b.yaml", "No such file"),
        (f"{'a' * 300}.yaml", "File name too long"),
        ("nul\0.yaml", "null byte"),
    ):
        with pytest.raises(FileError, match=part):
            engine.read_lock(tmp_path / name)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="UTF-8"):
        engine.read_lock(tmp_path / "binary.yaml")
    for name in ("plan.txt", "plan"):
        with pytest.raises(UsageError, match="YAML or JSON, by its name"):
            engine.read_lock(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write anything")
def test_rights_are_respected(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    engine.resolve(hardware=with_card()).lock(path)
    path.chmod(0)
    with pytest.raises(FileError, match="Permission denied"):
        engine.read_lock(path)
    with pytest.raises(FileError, match="permission denied"):
        lockfile.check_place(path)


def test_only_a_lock_is_replaced(tmp_path: Path, text: str) -> None:
    plan = engine.resolve(hardware=with_card())
    for kind, content in (
        ("yaml", "our: settings\n"),
        ("json", '{"name": "package"}'),
        ("yaml", text[: len(text) // 2] + "\n: ["),
        ("yaml", "schema: dg-run/profile@1\n"),
        ("json", text),
    ):
        path = write(tmp_path, f"there.{kind}", content)
        with pytest.raises(FileError, match="is not a lock"):
            plan.lock(path)
        assert path.read_text(encoding="utf-8") == content
    for content in (text.replace("batch: 1", "batch: 2"), text, "", text.replace("lock@1", "lock@9")):
        path = write(tmp_path, "there.yaml", content)
        assert plan.lock(path) == engine.read_lock(path)


def test_a_lock_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    engine.resolve(hardware=with_card()).lock(tmp_path / "plan.yaml")
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "plan.yaml").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "plan.yaml"]


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("missing/plan.yaml", "it does not exist"),
        (f"{'a' * 300}.yaml", "File name too long"),
        ("nul\0.yaml", "null byte"),
        ("file/plan.yaml", "that is no directory"),
        ("dir.yaml", "a directory"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, place: str, part: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dir.yaml").mkdir()
    with pytest.raises(FileError, match=part):
        engine.resolve(hardware=with_card()).lock(tmp_path / place)


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan = engine.resolve(hardware=with_card())
    plan.lock(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
        with pytest.raises(FileError, match="cannot be written"):
            plan.lock(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_locks_written_at_once_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plans = [engine.resolve(hardware=with_card(), steps=n) for n in (2, 3)]
    threads = [threading.Thread(target=lambda p=p: [p.lock(path) for _ in range(20)]) for p in plans]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        if path.exists():
            assert engine.read_lock(path).request.steps in (2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.yaml"]


def test_what_cannot_be_run_as_it_is_is_not_locked(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    with pytest.raises(NothingFitsError, match="is not locked"):
        engine.resolve("black-forest-labs/FLUX.1-dev", hardware=with_card(2), profile="low").lock(path)
    with pytest.raises(IncompatibleError, match="leaves its dtype open"):
        engine.resolve(hardware=machine(), vram="12GiB").lock(path)
    gone = dataclasses.replace(engine.resolve(hardware=with_card()), request=engine.resolve().request)
    with pytest.raises(ModelError):
        dataclasses.replace(gone, request=dataclasses.replace(gone.request, model="no/such-model")).lock(path)
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_would_not_be_read_again_is_not_locked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be locked"):
        engine.resolve(device="cpu", hardware=machine(), call={"x": 10**30}).lock(tmp_path / "plan.yaml")
    assert list(tmp_path.iterdir()) == []


def test_reading_a_lock_imports_nothing_heavy(tmp_path: Path) -> None:
    engine.resolve(device="cpu").lock(tmp_path / "plan.json")
    code = (
        "import sys, engine; engine.read_lock(sys.argv[1]);"
        " print({'torch', 'diffusers', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "set()\n"


def test_plain_yaml_and_documents_agree_on_a_lock(text: str) -> None:
    value = json.loads(lock.parse(text, "x").text("json"))
    assert plain.yaml(value) == "".join(line for line in text.splitlines(True) if not line.startswith("#"))
