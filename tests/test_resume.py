"""Runs of many outputs: killed at any moment they go on where they were, and nothing is lost, redone or mixed up."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import engine
from engine import cli, prompts
from engine.run import items, media, runner
from tests.conftest import write

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle")
FAST = ["--device", "cpu", "--num_inference_steps", "1"]


@pytest.fixture(scope="module")
def embedded() -> Any:
    """The embedded pipeline, loaded once for the module."""
    from engine.run import load

    return load.load(engine.resolve(device="cpu"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, embedded: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("engine.run.load.load", lambda plan, told=None, debug=False: embedded)
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    code = cli.main(["--auto", *FAST, *arguments])
    said = capsys.readouterr()
    return code, said.out.split(), said.err


def of(count: int) -> str:
    return "".join(f"a {COLOURS[k % 5]} {SHAPES[k % 3]} on a black background\n" for k in range(count))


def shown(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Return the pictures of a folder: their pixels, and what they say they are."""
    found = {}
    for path in folder.glob("[0-9]*.png"):
        with Image.open(path) as picture:
            found[path.name] = picture.tobytes(), media.read_record(path)["item"]
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    found = []
    for line in (folder / "dg-run.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off by a kill
            continue
    return found


@pytest.mark.usefixtures("loaded", "no_card")
def test_prompts_of_a_file_are_numbered_into_a_folder_with_a_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path, "p.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a blue square", "seed": 9, "num_images": 1}\n')
    code, out, err = run(capsys, "--prompts", "p.jsonl", "--num_images", "2", "--seed", "4")
    assert code == 0, err
    assert out == [f"outputs/p/{name}.png" for name in ("0001-4", "0002-5", "0003-9")]
    first, *rest = log(tmp_path / "outputs/p")
    assert (first["event"], first["seed"], first["count"]) == ("run", 4, 3)
    assert [(e["file"], e["prompt"], e["seed"], e["number"]) for e in rest] == [
        ("0001-4.png", "a red circle", 4, 0),
        ("0002-5.png", "a red circle", 5, 1),
        ("0003-9.png", "a blue square", 9, 2),
    ]
    assert all(e["measured_s"] > 0 and e["plan_digest"] and e["versions"]["torch"] for e in rest)
    assert sorted(p.name for p in (tmp_path / "outputs/p").iterdir() if p.name.startswith(".")) == []


@pytest.mark.usefixtures("loaded", "no_card")
def test_a_run_goes_on_where_it_ended_with_the_seed_that_it_had(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "p.txt", of(3))
    _, first, _ = run(capsys, "--prompts", "p.txt", "--batch_size", "2")
    before = {p: (shown_one(str(p)), p.stat().st_mtime_ns) for p in map(Path, first)}
    code, out, err = run(capsys, "--prompts", "p.txt", "--batch_size", "2")
    assert (code, out) == (0, [])
    assert "6 of 6 are there already" in err
    Path(first[3]).unlink()  # one of the two of a call
    code, out, err = run(capsys, "--prompts", "p.txt", "--batch_size", "2")
    assert (code, out) == (0, [first[3]])
    assert "going on with the run in outputs/p that began with seed" in err and "generating …" not in err
    assert shown_one(first[3]) == before[Path(first[3])][0]
    assert all(p.stat().st_mtime_ns == t for p, (_, t) in before.items() if p != Path(first[3]))
    # Another seed is another run beside it; another prompt of the same number and seed is refused.
    code, out, _ = run(capsys, "--prompts", "p.txt", "--seed", "1")
    assert (code, len(out)) == (0, 3)
    write(tmp_path, "q.txt", of(3).replace("black", "white"))
    code, _, err = run(capsys, "--prompts", "q.txt", "--seed", "1", "--output", "outputs/p")
    assert code == 8
    assert "0001-1.png is there, and is of another run" in err


@pytest.mark.usefixtures("loaded", "no_card")
def test_what_nobody_can_read_is_not_written_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, "p.txt", of(1))
    (tmp_path / "o").mkdir()
    (tmp_path / "o/0001-1.png").write_bytes(b"my own")
    code, _, err = run(capsys, "--prompts", "p.txt", "--seed", "1", "--output", "o/")
    assert code == 8
    assert "nobody can say what it is" in err
    assert (tmp_path / "o/0001-1.png").read_bytes() == b"my own"


@pytest.mark.usefixtures("loaded", "no_card")
def test_two_runs_into_one_folder_do_not_mix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from filelock import FileLock

    write(tmp_path, "p.txt", of(1))
    (tmp_path / "o").mkdir()
    with FileLock(tmp_path / "o/.dg-run.lock"):
        code, out, err = run(capsys, "--prompts", "p.txt", "--output", "o")
    assert (code, out) == (8, [])
    assert "another dg-run is writing into o" in err
    assert run(capsys, "--prompts", "p.txt", "--output", "o")[0] == 0


REFUSED = {
    "both": (2, ["--prompt", "a", "--prompts", "p.txt"], "--prompt and --prompts contradict each other"),
    "one file for several": (2, ["--prompts", "p.txt", "--output", "a.png"], "--output a/"),
    "no number": (2, ["--prompt", "a", "--num_images", "0"], "num_images is 0"),
    "no file": (8, ["--prompts", "none.txt"], "none.txt cannot be read"),
    "a folder that cannot be": (8, ["--prompts", "p.txt", "--output", "p.txt/x/"], "cannot be written"),
    "nothing to repeat": (8, ["--like", "p.txt"], "is neither a PNG nor an mp4"),
}


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "p.txt", of(1))
    code, arguments, part = REFUSED[name]
    found = cli.main(arguments if "--like" in arguments else ["--auto", "--device", "cpu", *arguments])
    said = capsys.readouterr()
    assert (found, said.out) == (code, "")
    assert part in said.err
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("loaded", "no_card")
def test_an_output_is_shown_and_made_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, (path,), _ = run(capsys, "--prompt", "a red circle", "--seed", "5", "--height", "64", "--width", "96")
    assert cli.main(["show", path]) == 0
    out = capsys.readouterr().out
    for part in ("a red circle", "seed       5", "96 x 64, 1 step,", "profile cpu", "torch 2", f"dg-run --like {path}"):
        assert part in out
    assert cli.main(["show", path, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["prompt"], said["seed"], said["plan"]["request"]["height"]) == ("a red circle", 5, 64)
    assert cli.main(["--like", path]) == 0
    again = capsys.readouterr().out.strip()
    assert again != path
    first, second = (shown_one(p) for p in (path, again))
    assert first == second
    assert cli.main(["--like", path, "--seed", "6", "--output", "six.png"]) == 0
    assert shown_one("six.png")[0] != first[0]
    assert media.read_record(Path("six.png"))["plan_digest"] == media.read_record(Path(path))["plan_digest"]


def shown_one(path: str) -> tuple[bytes, str]:
    with Image.open(path) as picture:
        return picture.tobytes(), media.read_record(Path(path))["item"]


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, plan = tmp_path / "x.png", engine.resolve(device="cpu").to_json()
    said = {"dg-run": plan, "prompt": "a \x1b]0;red\x07 circle\non 青い\u3000背景", "seed": "1", "image": "\x9b2J"}
    media.write(Image.new("RGB", (8, 8)), path, said)
    assert cli.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "a \\x1b]0;red\\x07 circle\n             on 青い\u3000背景\n" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)
    for wrong in ({"prompt": " "}, {"seed": "-1"}, {"seed": "9" * 5_000}):
        media.write(Image.new("RGB", (8, 8)), path, said | wrong)
        assert cli.main(["show", str(path)]) == 8
        assert "does not say what it was made with" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded", "no_card")
def test_when_the_folder_takes_no_more_each_output_of_a_call_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, spare = media.write, tmp_path / "spare"
    spare.mkdir()

    def full(output: Any, path: Path, record: dict[str, str]) -> None:
        if path.parent == Path("out"):
            raise OSError(errno.ENOSPC, "No space left on device")
        written(output, path, record)

    monkeypatch.setattr(media, "write", full)
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    code, out, err = run(capsys, "--prompt", "a red circle", "--batch_size", "3", "--seed", "5", "--output", "out/")
    assert (code, out) == (8, [])
    kept = re.findall(r"it was kept: (\S+\.png)", err)
    assert sorted(media.read_record(Path(k))["seed"] for k in kept) == ["5", "6", "7"]


@pytest.mark.usefixtures("loaded", "no_card")
def test_what_a_killed_run_was_writing_is_gone_after_the_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    left = [".0001-5.png.01234567.tmp", ".0002-6.broken.png.89abcdef.tmp", "0001-5.preview.png"]
    others = [".0001-5.png.tmp", ".notes.tmp", "preview.png"]
    for name in (*left, *others):
        (folder / name).write_bytes(b"x")
    assert run(capsys, "--prompt", "a red circle", "--seed", "5", "--output", "out/")[0] == 0
    assert sorted(f.name for f in folder.iterdir()) == sorted([*others, "0001-5.png", "dg-run.jsonl"])


@pytest.mark.usefixtures("loaded", "no_card")
def test_a_prompt_that_is_longer_than_what_the_model_reads_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "--prompt", "a red circle " + "on a blue background " * 2_500)
    assert (code, len(out)) == (0, 1), err
    assert re.search(r"note: the model reads \d+ tokens of a prompt, and one is longer: it is cut off after “….+”", err)
    assert len(media.read_record(Path(out[0]))["prompt"]) > 50_000


def test_a_run_of_ten_thousand_prompts_is_planned_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", of(10_000))
    start = time.perf_counter()
    made = items.calls(prompts.read(path), 0, 1)
    assert len(made) == 10_000
    assert time.perf_counter() - start < 5


# What survives a kill. One process imports torch, and forks those that are killed.

_FORKS = """
import os, random, signal, sys, time
import torch, diffusers, transformers
torch.set_num_threads(1)
from diffusers import FluxPipeline
from engine import cli
draw, kills = random.Random(int(sys.argv[1])), int(sys.argv[2])
by = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
arguments = sys.argv[3:]
while True:
    child = os.fork()
    if child == 0:
        os._exit(cli.main(list(arguments)))
    if kills:
        kills -= 1
        time.sleep(draw.uniform(0.2, float(os.environ["LONGEST_S"])))
        os.kill(child, draw.choice(by) if draw.random() < 0.4 else signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
    if os.waitstatus_to_exitcode(status) == 0:
        break
"""


def killed(tmp_path: Path, count: int, kills: int, longest_s: float, seed: int) -> list[int]:
    """Run prompts of a file to the end, killed so many times on the way; return how each process ended."""
    write(tmp_path, "p.txt", of(count))
    arguments = ["--auto", *FAST, "--prompts", "p.txt", "--batch_size", "2", "--num_images", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "LONGEST_S": str(longest_s)}
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, str(seed), str(kills), *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended")]


def held_to_a_plain_run(tmp_path: Path, count: int) -> None:
    """See that a folder has every output once, whole, and as it is drawn without an interruption."""
    import engine

    folder = tmp_path / "outputs/p"
    seed = log(folder)[0]["seed"]
    found = shown(folder)
    plan = engine.resolve(device="cpu", steps=1)
    calls = items.calls(prompts.read(tmp_path / "p.txt"), seed, 1)
    expected = {f"{i.number + 1:04}-{i.seed}.png": i for c in calls for i in c.items}
    assert set(found) == set(expected)
    assert len(found) == count
    for made in runner.run(plan, calls):
        for item, output in made.each():
            name = f"{item.number + 1:04}-{item.seed}.png"
            assert isinstance(output, Image.Image)
            assert found[name] == (output.tobytes(), items.identity(plan.request, item))
    outputs = [e["file"] for e in log(folder) if e["event"] == "output"]
    assert len(outputs) == len(set(outputs)), "an output was made twice"
    left = [p.name for p in folder.iterdir() if p.name not in found and p.name != "dg-run.jsonl"]
    assert all(name.startswith(".") for name in left), left


def test_a_run_that_is_killed_twice_is_finished_whole(tmp_path: Path) -> None:
    ended = killed(tmp_path, 6, 2, 3.0, seed=random.SystemRandom().randrange(2**31))
    assert ended[-1] == 0
    assert len(ended) <= 3
    held_to_a_plain_run(tmp_path, 6)


@pytest.mark.slow
def test_fifty_prompts_killed_at_random_moments_are_finished_whole(tmp_path: Path) -> None:
    ended = killed(tmp_path, 50, 12, 6.0, seed=random.SystemRandom().randrange(2**31))
    assert len(ended) >= 4, "it was killed three times at the least"
    held_to_a_plain_run(tmp_path, 50)


_STARTED = """\
import signal, sys
from engine.cli import main

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch is started", signal.getsignal(signal.SIGTERM).__qualname__)
            raise SystemExit(0)

sys.meta_path.insert(0, Watch())
main(sys.argv[1:])
"""


@pytest.mark.parametrize("more", [[], ["--require", "staged_encoding"]])
def test_torch_is_started_where_signals_are_held_back(tmp_path: Path, more: list[str]) -> None:
    """A signal within its start ends the process by `terminate`, or as if nobody had caught it."""
    command = [sys.executable, "-c", _STARTED, "--auto", *FAST, "--prompt", "a red circle", *more]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60).stdout
    assert out == "torch is started held_back.<locals>.remember\n"


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "--auto", "--device", "cpu", "--prompt", "a red circle"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--num_inference_steps", "5000", "--output", "o/"],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path / "o").glob("*") if p.name != "dg-run.jsonl"] == []


def test_pictures_of_one_call_are_those_of_calls_of_one(tmp_path: Path) -> None:
    """The number that is made at a time is no part of what an output is; only the last bits may tell."""
    import engine

    alone = [
        np.asarray(i, dtype=int)
        for i in engine.resolve(device="cpu", steps=1).run("a red circle", seed=3, num_images=3)
    ]
    plan = engine.resolve(device="cpu", steps=1, batch=2)
    together = [np.asarray(i, dtype=int) for i in plan.run("a red circle", seed=3, num_images=3)]
    assert len(alone) == len(together) == 3
    assert max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 2
