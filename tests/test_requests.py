"""`dg-run plan --requests`: a line in, a line out, in order; what is wrong with one keeps nobody from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import cli
from engine.cli import requests

pytestmark = pytest.mark.usefixtures("no_card", "no_estimates")
Answer = dict[str, Any]


def answered(capsys: pytest.CaptureFixture[str], path: Path, lines: list[str] | bytes) -> list[Answer]:
    """Return the answers to the lines of a file; nothing may go to stderr."""
    path.write_bytes(lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode())
    code = cli.main(["plan", "--requests", str(path)])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    return [json.loads(line, parse_constant=pytest.fail) for line in said.out.splitlines()]


@pytest.fixture
def answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    return lambda *lines: answered(capsys, tmp_path / "requests.jsonl", list(lines))


def line(**request: Any) -> str:
    return json.dumps(request)


def test_answers_come_in_order_with_the_ids_of_their_requests(answers: Any) -> None:
    found = answers(line(id="b", height=64), line(id=7, height=80), "", line(height=96), line(id=None, height=112))
    assert [a["id"] for a in found] == ["b", 7, 4, None]
    assert [a["request"]["height"] for a in found] == [64, 80, 96, 112]
    assert all(a["schema"] == "dg-run/plan@1" for a in found)


@pytest.mark.parametrize("name", [{"a": [1, {"b": None}]}, [], "", 0, 1.5, True, "\ud800", "日本", "a\nb"])
def test_an_id_is_given_back_whatever_it_is(answers: Any, name: Any) -> None:
    good, bad = answers(line(id=name), line(id=name, height=1))
    assert good["id"] == name
    assert bad["id"] == name
    assert bad["error"]["code"] == 2


WRONG: dict[str, tuple[str, int, str]] = {
    "no JSON": ("{", 2, "line 1 is not JSON"),
    "two on a line": ("{} {}", 2, "is not JSON"),
    "not a number": ('{"id": NaN}', 2, "is not JSON"),
    "no end of numbers": ('{"guidance": -Infinity}', 2, "is not JSON"),
    "digits without end": ('{"height": ' + "9" * 5000 + "}", 2, "is not JSON"),
    "nested without end": ("[" * 100_000, 2, "is not JSON"),
    "a list": ("[]", 2, "line 1 is not an object"),
    "a word": ('"x"', 2, "line 1 is not an object"),
    "nothing": ("null", 2, "line 1 is not an object"),
    "no text at all": ("\x00", 2, "is not JSON"),
    "unknown key": (line(hieght=64), 2, "a request has no hieght"),
    "unknown key of the hardware": (line(hardware={"vrma": "1GiB"}), 2, "a request has no vrma"),
    "unknown model": (line(model="black-forest-labs/FLUX1-dev"), 5, "FLUX1-dev"),
    "model that is a number": (line(model=5), 2, "model is not text"),
    "model that is a list": (line(model=[]), 2, "model is not text"),
    "class that is a number": (line(pipeline_class=5), 2, "pipeline_class is not text"),
    "profile that is a number": (line(profile=5), 2, "profile is not text"),
    "profile that is none": (line(profile="lwo"), 3, "lwo"),
    "height of words": (line(height="x"), 2, "height must be a whole number"),
    "height in between": (line(height=100), 2, "cannot be made by FluxPipeline"),
    "width of halves": (line(width=64.5), 2, "width must be a whole number"),
    "width below": (line(width=-64), 2, "width is -64"),
    "frames that are true": (line(frames=True), 2, "frames must be a whole number"),
    "batch of none": (line(batch=0), 2, "batch is 0"),
    "batch of lists": (line(batch=[1]), 2, "batch must be a whole number"),
    "steps of words": (line(steps="x"), 2, "steps must be a whole number"),
    "steps without end": (line(steps=10**9), 2, "steps is 1000000000"),
    "guidance of words": (line(guidance="x"), 2, "guidance must be a number"),
    "guidance beyond": ('{"guidance": 1e999}', 2, "guidance must be a number"),
    "hardware that is a number": (line(hardware=5), 2, "hardware is not an object"),
    "hardware that is an empty list": (line(hardware=[]), 2, "hardware is not an object"),
    "hardware that is false": (line(hardware=False), 2, "hardware is not an object"),
    "card that nobody knows": (line(hardware={"gpu": "Voodoo 9"}), 2, "there is no card"),
    "card that is a list": (line(hardware={"gpu": ["x"]}), 2, "there is no card"),
    "memory of words": (line(hardware={"vram": "lots"}), 2, "vram"),
    "memory of objects": (line(hardware={"vram": {}}), 2, "vram must be a size"),
    "host memory that is true": (line(hardware={"host_ram": True}), 2, "host_ram must be a size"),
    "call that is a list": (line(call=[]), 2, "call is not an object"),
    "call that is text": (line(call="x"), 2, "call is not an object"),
    "components that are a list": (line(components=["vae"]), 2, "components is not an object"),
    "component that is put in": (line(components={"vae": "x"}), 2, "can only be left out"),
    "component that is none": (line(components={"vea": None}), 2, "has no component 'vea'"),
    "optimizers that are text": (line(optimizers="dtype"), 2, "optimizers is not a list"),
    "optimizers that are an object": (line(optimizers={}), 2, "optimizers is not a list"),
    "optimizer that is a number": (line(optimizers=[5]), 2, "5 is not an optimizer"),
    "optimizer that is a list": (line(optimizers=[[]]), 2, "[] is not an optimizer"),
    "optimizer that is none": (line(optimizers=["vae_tilling"]), 2, "vae_tilling"),
    "optimizer without a name": (line(optimizers=[{"params": {}}]), 2, "is not an optimizer"),
    "parameters that are a number": (line(optimizers=[{"name": "dtype", "params": 5}]), 2, "params cannot be 5"),
    "parameters that are a list": (line(optimizers=[{"name": "dtype", "params": ["x"]}]), 2, "params cannot be"),
    "parameter that is none": (line(optimizers=[{"name": "dtype", "params": {"x": 1}}]), 2, "no parameter 'x'"),
    "parameter of another kind": (line(optimizers=[{"name": "dtype", "params": {"value": []}}]), 2, "value cannot be"),
    "two placements": (line(optimizers=["resident", "model_offload"]), 3, "cannot be combined"),
    "a list and a profile": (line(optimizers=[], profile="low"), 2, "a profile and an exact list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_line_is_its_answer(answers: Any, name: str) -> None:
    wrong, code, part = WRONG[name]
    first, second = answers(wrong, line(id="after"))
    assert set(first) == {"id", "error"}
    assert set(first["error"]) == {"code", "what", "why", "do"}
    assert first["error"]["code"] == code, first
    assert part in first["error"]["what"]
    assert second["id"] == "after"
    assert "error" not in second


def test_null_is_as_good_as_nothing(answers: Any) -> None:
    bare, nulls = answers("{}", line(**{k: None for k in requests._KEYS if k != "id"}))
    assert nulls == bare | {"id": 2}


def test_an_answer_is_the_plan_of_that_request(answers: Any) -> None:
    (found,) = answers(line(optimizers=["vae_tiling"], hardware={"gpu": "RTX 4090", "vram": "20GiB"}, steps=3))
    assert found["request"]["steps"] == 3
    assert [s["name"] for s in found["optimizers"]] == ["vae_tiling", "resident"]
    assert found["hardware"]["gpus"][0]["free_bytes"] == 20 * 1024**3
    assert found["hardware"]["gpus"][0]["hypothetical"] is True


def test_a_call_that_is_nested_beyond_reason_is_refused(answers: Any) -> None:
    deep = '{"call": {"a": ' + "[" * 900 + "]" * 900 + "}}"
    first, second = answers(deep, "{}")
    assert "error" not in second
    assert first.get("error", {"code": 2})["code"] == 2


def test_a_mistake_of_ours_in_one_answer_keeps_nobody_from_the_others(
    answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = requests.arguments

    def broken(request: Any) -> Any:
        if request.get("height") == 64:
            raise ZeroDivisionError("oops")
        return real(request)

    monkeypatch.setattr(requests, "arguments", broken)
    first, second = answers(line(id="a", height=64), line(id="b"))
    assert (first["id"], first["error"]["code"]) == ("a", 1)
    assert "ZeroDivisionError: oops" in first["error"]["what"]
    assert "error" not in second


def test_an_empty_file_has_no_answers(answers: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert answers() == []
    assert answers("", "  ", "\t") == []
    assert answered(capsys, tmp_path / "x", b"{}") != []  # the last line need not end


def test_bytes_that_are_no_text_are_no_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = answered(capsys, tmp_path / "x", b"\xff\xfe\n{}\r\n")
    assert first["error"]["what"] == "line 1 is not JSON"
    assert "error" not in second


@pytest.mark.parametrize("name", ["there is none", "."])
def test_a_file_that_cannot_be_read_is_exit_8(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    assert cli.main(["plan", "--requests", str(tmp_path / name)]) == 8
    said = capsys.readouterr()
    assert said.out == ""
    assert "cannot be read" in said.err
    assert "Traceback" not in said.err


def test_a_line_without_end_is_refused_after_the_answers_before_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"{}\n" + b" " * (requests.MAX_LINE_BYTES + 1) + b"\n{}\n")
    assert cli.main(["plan", "--requests", str(path)]) == 8
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert "a line of more than 1 MiB" in said.err


@pytest.mark.parametrize("more", [["--json"], ["--height", "64"], ["--auto"], ["--batch_size=2"], ["--call", "a=1"]])
@pytest.mark.parametrize("written", [["--requests", "{}"], ["--requests={}"]])
def test_it_takes_no_other_option(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, written: list[str], more: list[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    assert cli.main(["plan", *(w.format(path) for w in written), *more]) == 2
    assert "contradict each other" in capsys.readouterr().err
    assert cli.main(["plan", *(w.format(path) for w in written)]) == 0


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["vae", "dtype", "low", "RTX 4090", "12GiB", "embedded", "vae_tiling", 64, 128])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "params", "value", "gpu", "vram", "vae", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES | st.dictionaries(st.sampled_from(requests._KEYS), VALUES, max_size=4), max_size=4))
def test_no_value_whatever_gets_anything_but_an_answer(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, values: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    found = answered(capsys, path, [json.dumps(v) for v in values])
    assert len(found) == len(values)
    assert not [a["error"] for a in found if a.get("error", {}).get("code") == 1]
