"""`dg-run profiles`: what a team types, and what its CI reads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import cli, profiles, review, validation
from tests.conftest import write
from tests.test_profiles import GOOD

pytestmark = pytest.mark.usefixtures("no_card")
BROKEN = "schema: dg-run/profile@1\nname: [\n"
SCENARIO = """\
why: a reason
hardware: {free_vram: 11.6GiB}
expect: {profile: team, contains: [vae_tiling]}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of one's own, and an empty configuration."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DG_RUN_CONFIG", str(tmp_path / "config"))
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["profiles", *arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return run


def team(folder: Path, text: str = GOOD, name: str = "team.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, name, text)


# list and show.


def test_list_says_where_each_is_from_and_what_it_shadows(run: Any, here: Path) -> None:
    team(here / "profiles", GOOD.replace("name: team", "name: low"))
    team(here / "profiles", BROKEN, "broken.yaml")
    code, out, _ = run("list")
    assert code == 0
    assert "low          1.2.3   profiles/team.yaml\n" in out
    assert "             shadows built-in\n" in out
    assert "  low          built-in, shadowed by profiles/team.yaml\n" in out
    assert "broken       cannot be used: profiles/broken.yaml\n" in out
    found = {(p["name"], p["source"]): p for p in json.loads(run("list", "--json")[1])}
    assert found["low", "profiles/team.yaml"]["shadows"] == ["built-in"]
    assert found["low", "built-in"]["shadowed_by"] == "profiles/team.yaml"
    assert found["low", "profiles/team.yaml"]["optimizers"][:2] == ["dtype: auto", "vae_tiling"]
    assert "broken.yaml:2:8" in found["broken", "profiles/broken.yaml"]["error"]


def test_show_tells_what_comes_of_a_parent(run: Any, here: Path) -> None:
    team(here / "profiles")
    head = "schema: dg-run/profile@1\nname: ours\nversion: 1.0.0\nsummary: x\n"
    path = team(here / "profiles", head + "extends: team\ndrop: [group_offload]\n", "ours.yaml")
    code, out, _ = run("show", "ours")
    assert code == 0
    first, *text = out.splitlines()
    assert first == "# ours 1.0.0, profiles/ours.yaml: valid"
    assert text[:6] == path.read_text(encoding="utf-8").splitlines()
    assert text[7:] == [
        "# with what it takes over from team:",
        "#   match: from 7.20 GiB of free VRAM",
        "#   - dtype: auto",
        "#   - vae_tiling",
        "# overridden:",
        "#   group_offload of team 1.2.3: dropped",
    ]


# lint.

BAD = GOOD.replace("vae_tiling", "vae_tilling").replace("version: 1.2.3", "version: 1.2")


def test_lint_of_what_is_sound(run: Any, here: Path) -> None:
    team(here / "profiles")
    assert run("lint", "profiles") == (0, "1 profile, 0 problems, 0 warnings\n", "")
    assert run("lint", "profiles/team.yaml", "--format", "github") == (0, "", "")
    assert run("lint", "profiles/team.yaml", "--format=json") == (0, "[]\n", "")


def test_lint_tells_everything_that_is_wrong_in_every_file(run: Any, here: Path) -> None:
    team(here / "a", BAD)
    team(here / "a", GOOD.replace("name: team", "name: other").replace("auto", "int8"), "other.yaml")
    code, out, _ = run("lint", "a")
    assert code == 3
    lines = [line for line in out.splitlines() if line.startswith(("a/", "2 "))]
    assert lines == [
        "a/other.yaml:8:12: error: 'int8' is not known here",
        "a/team.yaml:3:10: error: 1.2 is not text",
        "a/team.yaml:9:5: error: 'vae_tilling' is not known here",
        "2 profiles, 3 problems, 0 warnings",
    ]
    assert "         |   - vae_tilling\n         |     ^\n         do: did you mean 'vae_tiling'?\n" in out


def test_lint_for_github_is_one_annotation_a_problem(run: Any, here: Path) -> None:
    team(here, BAD, "50%,a:b.yaml")
    code, out, _ = run("lint", "50%,a:b.yaml", "--format", "github")
    assert code == 3
    assert out.splitlines() == [
        "::error file=50%25%2Ca%3Ab.yaml,line=3,col=10::1.2 is not text. write three numbers, such as 1.0.0;"
        " 1.1.0-rc.1 comes before 1.1.0",
        "::error file=50%25%2Ca%3Ab.yaml,line=9,col=5::'vae_tilling' is not known here. did you mean 'vae_tiling'?",
    ]


def test_lint_as_json(run: Any, here: Path) -> None:
    team(here, BAD)
    code, out, _ = run("lint", "team.yaml", "--format", "json")
    assert code == 3
    assert json.loads(out)[1] == {
        "file": "team.yaml",
        "line": 9,
        "column": 5,
        "severity": "error",
        "message": "'vae_tilling' is not known here",
        "do": "did you mean 'vae_tiling'?",
    }


@pytest.mark.parametrize("form", ["text", "github", "json"])
def test_lint_of_what_cannot_be_read_goes_on_with_the_rest(run: Any, here: Path, form: str) -> None:
    team(here, BAD)
    (here / "empty").mkdir()
    code, out, _ = run("lint", "gone.yaml", "empty", "team.yaml", "--format", form)
    assert code == 8
    for word in ("gone.yaml", "No such file", "empty holds no .yaml file", "vae_tilling"):
        assert word in out


def test_lint_warns_of_what_is_surely_not_meant(run: Any, here: Path) -> None:
    team(
        here,
        GOOD.replace("  - vae_tiling\n", "  - one_of: [none, vae_tiling]\n  - one_of: [none, model_offload]\n"),
    )
    code, out, _ = run("lint", "team.yaml")
    assert code == 0
    assert "team.yaml:10:20: warning: the alternative model_offload can never be taken" in out
    assert out.endswith("1 profile, 0 problems, 1 warning\n")
    child = "schema: dg-run/profile@1\nname: c\nversion: 1.0.0\nsummary: x\nextends: low\nset: {dtype: auto}\n"
    team(here, child, "child.yaml")
    code, out, _ = run("lint", "child.yaml", "--format", "github")
    assert (code, out.partition("::this")[0]) == (0, "::warning file=child.yaml,line=6,col=7")


def test_lint_tells_of_one_name_in_two_files_of_a_folder(run: Any, here: Path) -> None:
    team(here / "a")
    team(here / "a", name="copy.yaml")
    code, out, _ = run("lint", "a")
    assert code == 3
    assert "a/copy.yaml:2:7: error: the name 'team' is also that of a/team.yaml" in out


@pytest.mark.usefixtures("no_estimates_here")
def test_a_plan_says_which_broken_profile_was_passed_over(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    team(here / "profiles", BROKEN, "low.yaml")
    said = "profile low is not valid, and nothing is tried in its place: dg-run profiles lint profiles/low.yaml"
    for more, is_said in ((["--vram", "8GiB"], True), (["--profile", "cpu"], False), (["--exact"], False)):
        assert cli.main(["plan", *more]) == 0
        out = capsys.readouterr().out
        assert (said in " ".join(out.split())) is is_said
    assert cli.main(["plan", "--vram", "8GiB", "--json"]) == 0
    plan = engine.Plan.from_json(capsys.readouterr().out)
    assert [n.because for n in plan.notes if n.kind == "broken_profile"] == [said]
    assert plan.profile is not None
    assert plan.profile.name != "low"


# new and schema.


def test_new_writes_what_lint_finds_sound(run: Any, here: Path) -> None:
    for arguments in (["rig"], ["low", "--extends", "low"], ["1", "--extends", "rig"], ["true"]):
        code, out, _ = run("new", *arguments)
        assert (code, out) == (0, f"profiles/{arguments[0]}.yaml\n")
    assert run("lint", "profiles") == (0, "4 profiles, 0 problems, 0 warnings\n", "")
    assert profiles.find("low").extends == "low"
    assert (here / "profiles" / "profile.schema.json").read_text(encoding="utf-8") == validation.schema_text("profile")
    first = (here / "profiles" / "rig.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=profile.schema.json"


def test_the_comments_of_a_skeleton_are_sound_when_they_are_no_comments(run: Any, here: Path) -> None:
    run("new", "rig")
    path = here / "profiles" / "rig.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = ("match:", "  free", "  pixels", "  gpus", "  pipelines", "  device", "prefer:", "fallback:")
    path.write_text(
        "\n".join(s[2:] if s[:2] == "# " and s[2:].startswith(keys) else s for s in lines), encoding="utf-8"
    )
    assert run("lint", "profiles")[:2] == (0, "1 profile, 0 problems, 0 warnings\n")
    made = profiles.find("rig")
    assert made.match.pixels_below == 4194304
    assert (made.prefer, made.fallback) == ("speed", "extreme-low")


def test_new_never_overwrites(run: Any, here: Path) -> None:
    path = team(here / "profiles", "mine", "rig.yaml")
    code, out, err = run("new", "rig")
    assert (code, out) == (8, "")
    assert "profiles/rig.yaml is there already" in err
    assert path.read_text(encoding="utf-8") == "mine"
    team(here, "{}", "profile.schema.json")
    assert run("new", "rig", "--output", "rig.yml")[0] == 0
    assert (here / "profile.schema.json").read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["Rig"], 2, "cannot be called 'Rig'"),
        (["a/b"], 2, "cannot be called 'a/b'"),
        (["rig", "--output", "rig.txt"], 2, "rig.txt is no name for a profile"),
        (["rig", "--extends", "meduim"], 3, "did you mean 'medium'?"),
        (["rig", "--output", "/proc/none/rig.yaml"], 8, "cannot be written"),
        ([], 2, "are required: NAME"),
    ],
)
def test_new_refuses(run: Any, arguments: list[str], code: int, said: str) -> None:
    found, out, err = run("new", *arguments)
    assert (found, out) == (code, "")
    assert said in err


def test_schema(run: Any, here: Path) -> None:
    code, out, _ = run("schema")
    assert (code, out) == (0, validation.schema_text("profile"))
    assert run("schema", "--output", "a/b.json")[0] == 0
    assert run("schema", "--output", "a/b.json")[0] == 0
    team(here, "{}", "other.json")
    assert run("schema", "--output", "other.json")[0] == 8
    assert (here / "other.json").read_text(encoding="utf-8") == "{}"


# test.


@pytest.fixture
def no_estimates_here(no_estimates: None) -> None:
    """As without torch."""


@pytest.mark.usefixtures("no_estimates_here")
def test_scenarios_of_a_team_run_against_its_profiles(run: Any, here: Path) -> None:
    team(here / "profiles", GOOD.replace("7.2GiB", "11GiB"))
    team(here / "scenarios", SCENARIO, "one.yaml")
    assert run("test") == (0, "ok   scenarios/one.yaml: a reason\n1 of 1 scenarios are as expected\n", "")
    team(here / "scenarios", SCENARIO.replace("[vae_tiling]", "[fuse_qkv]"), "two.yaml")
    code, out, _ = run("test", "scenarios/two.yaml", "scenarios/one.yaml")
    assert code == 3
    assert out.splitlines()[0] == "FAIL scenarios/two.yaml: a reason"
    assert out.splitlines()[1].startswith("     contains: fuse_qkv is not in [dtype: bfloat16, vae_tiling,")
    assert out.splitlines()[-1] == "1 of 2 scenarios are as expected"
    found = json.loads(run("test", "--json")[1])
    assert [bool(s["differences"]) for s in found["scenarios"]] == [False, True]


@pytest.mark.usefixtures("no_estimates_here")
def test_scenarios_can_be_run_against_one_folder_and_no_other(run: Any, here: Path) -> None:
    team(here / "profiles", GOOD.replace("7.2GiB", "11GiB"))
    team(here / "other", GOOD.replace("7.2GiB", "11.2GiB").replace("name: team", "name: rig"))
    team(here / "scenarios", SCENARIO.replace("profile: team", "profile: rig"), "one.yaml")
    assert run("test", "--profiles", "other")[0] == 0
    assert run("test", "--profiles", "profiles")[0] == 3
    assert run("test", "--profiles", "gone")[0] == 8


@pytest.mark.usefixtures("no_estimates_here")
def test_a_broken_profile_or_scenario_is_no_success(run: Any, here: Path) -> None:
    team(here / "scenarios", SCENARIO.replace("team", "low").replace("vae_tiling", "model_offload"), "one.yaml")
    assert run("test")[0] == 0
    team(here / "profiles", BROKEN)
    code, out, _ = run("test")
    assert code == 3
    assert "FAIL profiles/team.yaml: this is not a valid profile" in out.replace(str(here) + "/", "")
    team(here / "scenarios", "why: [", "two.yaml")
    code, out, _ = run("test")
    assert code == 8
    assert "scenarios/two.yaml:1:7: " in out


def test_a_missing_folder_of_scenarios(run: Any) -> None:
    code, _, err = run("test")
    assert code == 8
    assert "there is no folder scenarios/ here" in err


# diff.


def test_diff_of_what_means_the_same(run: Any, here: Path) -> None:
    for name in ("a", "b"):
        team(here / name, GOOD if name == "a" else GOOD + "# a comment\n")
    for arguments in (["a", "b"], ["a/team.yaml", "b/team.yaml"], ["low", "low"]):
        assert run("diff", *arguments, "--no-plans", "--exit-code") == (0, "The profiles mean the same.\n", "")


@pytest.mark.usefixtures("no_estimates_here")
def test_diff_of_folders_tells_profiles_and_plans(run: Any, here: Path) -> None:
    team(here / "a")
    team(here / "a", GOOD.replace("name: team", "name: gone"), "gone.yaml")
    team(here / "b", GOOD.replace("1.2.3", "1.3.0").replace("7.2GiB", "10GiB"))
    team(here / "b", GOOD.replace("name: team", "name: new").replace("7.2GiB", "40GiB"), "new.yaml")
    requests = [
        {"id": "small", "hardware": {"vram": "7GiB"}},
        {"id": "large", "hardware": {"vram": "41GiB"}},
        {"id": "exact", "optimizers": [{"name": "resident"}], "hardware": {"vram": "8GiB"}},
        {"id": "bad", "height": 100, "hardware": {"vram": "8GiB"}},
    ]
    team(here, "\n".join(map(json.dumps, requests)), "requests.jsonl")
    code, out, _ = run("diff", "a", "b", "--requests", "requests.jsonl")
    assert code == 0
    assert out.splitlines() == [
        "gone: removed",
        "  gone 1.2.3, from 7.20 GiB of free VRAM: dtype: auto → vae_tiling →"
        " group_offload (type: block_level, use_stream: false, blocks_per_group: 2)",
        "team: changed",
        "  version: 1.2.3 → 1.3.0",
        "  match: from 7.20 GiB of free VRAM → from 10.00 GiB of free VRAM",
        "new: added",
        "  new 1.2.3, from 40.00 GiB of free VRAM: dtype: auto → vae_tiling →"
        " group_offload (type: block_level, use_stream: false, blocks_per_group: 2)",
        "",
        "1 of 4 plans change:",
        "  large",
        "    profile: medium (whether it fits is not known) → new (whether it fits is not known)",
        "    optimizers: dtype: auto, vae_slicing, resident → dtype: auto, vae_tiling,"
        " group_offload (type: block_level, use_stream: false, blocks_per_group: 2)",
    ]
    code, out, _ = run("diff", "a", "b", "--requests", "requests.jsonl", "--json", "--exit-code")
    assert code == 3
    found = json.loads(out)
    assert [p["kind"] for p in found["profiles"]] == ["removed", "changed", "added"]
    assert found["plans"]["changed"][0]["after"]["profile"] == "new"


def test_diff_says_what_became_of_bytes_and_seconds(run: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plans from a table, so that every kind of change is there."""
    old = review.Answer(profile="a", fits=True, required_bytes=2**31, host_bytes=2**30, seconds=10.0, quality="exact")
    new = dataclasses.replace(old, profile="b", required_bytes=2**30, host_bytes=None, seconds=11.5, quality="near")
    changed = [("worse", old, new), ("gone", old, review.Answer(error="no")), ("never", review.Answer(), old)]
    monkeypatch.setattr(
        review, "compare", lambda *_: tuple(review.Changed(id=n, before=b, after=a) for n, b, a in changed)
    )
    code, out, _ = run("diff", "low", "low")
    assert code == 0
    assert out.splitlines() == [
        "The profiles mean the same.",
        "",
        f"3 of {len(review.USUAL)} plans change:",
        "  worse",
        "    profile: a → b",
        "    card: 2.00 GiB → 1.00 GiB (-1.00 GiB)",
        "    host: 1.00 GiB → not known",
        "    time: 10 s → 12 s (+1.50 s)",
        "    quality: exact → near",
        "  gone",
        "    a → refused (no)",
        "  never",
        "    profile: nothing fits → a",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["a", "low"], 2, "a folder cannot be held against a profile"),
        (["low", "meduim"], 3, "did you mean 'medium'?"),
        (["low"], 2, "are required: B"),
        (["low", "low", "--no-plans", "--requests", "x"], 2, "contradict each other"),
        (["low", "medium", "--requests", "gone.jsonl"], 8, "gone.jsonl cannot be read"),
        (["low", "medium", "--requests", "bad.jsonl"], 2, "line 1 is not JSON"),
        (["a", "broken"], 3, "this is not a valid profile"),
    ],
)
def test_diff_refuses(run: Any, here: Path, arguments: list[str], code: int, said: str) -> None:
    team(here / "a")
    team(here / "broken", BROKEN)
    team(here, "[", "bad.jsonl")
    found, _, err = run("diff", *arguments)
    assert found == code
    assert said in err


# All of them.


@pytest.mark.parametrize("arguments", [["lisst"], ["--json", "list"], []])
def test_what_is_no_action(run: Any, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dg-run: ")


def test_the_help_names_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    from engine.cli.profiles import ACTIONS

    for arguments in ([], *([a] for a in ACTIONS)):
        with pytest.raises(SystemExit) as caught:
            cli.main(["profiles", *arguments, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert all(f"  {a} " in out for a in ACTIONS) or arguments
        assert max(map(len, out.splitlines())) <= 120


def test_what_the_terminal_cannot_show_is_no_reason_to_stop(here: Path) -> None:
    with (here / "caf\udce9.yaml").open("w") as file:  # as a folder from an old system has it
        file.write(BROKEN)
    command = [sys.executable, "-m", "engine", "profiles"]
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "PYTHONIOENCODING": "ascii"}
    for arguments, code in ((["list"], 0), (["lint", "."], 3)):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=env)
        assert (done.returncode, done.stderr) == (code, "")
