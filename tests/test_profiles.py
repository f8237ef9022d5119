"""Profiles: the built-in ones are the guide's, and every mistake is told with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from engine import documents, optimizers, paths, profiles, validation
from engine.errors import ProfileError
from engine.units import parse_size
from engine.values import Profile
from tests.conftest import write
from tests.test_documents import BOMB

GUIDE = {
    "extreme-low": {"dtype", "sequential_offload", "vae_slicing", "vae_tiling"},
    "low": {"dtype", "model_offload", "vae_slicing"},
    "medium": {"dtype", "vae_slicing", "resident"},
    "hi-res": {"dtype", "vae_tiling", "model_offload"},
    "max": {"dtype", "resident"},
    "cpu": {"dtype", "vae_slicing", "resident"},
}
GOOD = """\
schema: dg-run/profile@1
name: team
version: 1.2.3
summary: ours
match:
  free_vram: {at_least: 7.2GiB}
optimizers:
  - dtype: auto
  - vae_tiling
  - group_offload: {type: block_level, blocks_per_group: 2, use_stream: false}
"""


def test_the_built_in_profiles_turn_on_what_the_guide_turns_on() -> None:
    assert {p.name: {s.name for s in p.steps} for p in profiles.built_in()} == GUIDE


@pytest.mark.parametrize("path", sorted(paths.data_dir("profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_built_in_profile_obeys_the_schema_and_is_named_for_its_file(path: Path) -> None:
    value = documents.read(path).value
    schema = json.loads((paths.data_dir("schema") / "profile.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(value)
    assert value["name"] == path.stem


@pytest.mark.parametrize("profile", profiles.built_in(), ids=lambda p: p.name)
def test_a_built_in_profile_is_written_in_the_order_of_slots(profile: Profile) -> None:
    assert profile.steps == optimizers.in_order(profile.steps)


def test_a_team_profile_is_read_with_its_parameters(tmp_path: Path) -> None:
    profile = profiles.find(str(write(tmp_path, "team.yaml", GOOD)))
    assert profile.match.free_vram_at_least_bytes == parse_size("7.2GiB")
    assert [str(s) for s in profile.steps] == [
        "dtype: auto",
        "vae_tiling",
        "group_offload (type: block_level, use_stream: false, blocks_per_group: 2)",
    ]


BAD = {
    "unknown-optimizer": (
        "vae_tiling\n",
        "vae_tilling\n",
        "9:5: 'vae_tilling' is not known here",
        "did you mean 'vae_tiling'?",
    ),
    "unknown-optimizer-with-params": (
        "group_offload:",
        "group_offlaod:",
        "10:5: unknown key 'group_offlaod'",
        "'group_offload'",
    ),
    "unknown-param": ("use_stream", "use_streams", "unknown key 'use_streams'", "did you mean 'use_stream'?"),
    "wrong-choice": ("block_level", "block", "10:27: 'block' is not known here", "did you mean 'block_level'?"),
    "wrong-type": ("use_stream: false", "use_stream: no", '"no" is not true or false', ""),
    "unknown-key": ("summary:", "sumary:", "4:1: unknown key 'sumary'", "did you mean 'summary'?"),
    "bad-size": ("7.2GiB", "7.2 gigs", '6:25: "7.2 gigs" is not a size with its unit, such as 7.2GiB', ""),
    "bare-size": ("7.2GiB", "8", "6:25: 8 is not text", ""),
    "zero-size": ("7.2GiB", "0GiB", "6:25: '0GiB' is out of range", ""),
    "newer-format": (
        "profile@1",
        "profile@2",
        "1:9: dg-run/profile@2 is of a newer dg-run; this one reads dg-run/profile@1",
        "update dg-run",
    ),
    "version": ("1.2.3", "1.2", "3:10: 1.2 is not text", ""),
    "twice": ("  - vae_tiling\n", "  - vae_tiling\n  - vae_tiling\n", "10:5: vae_tiling is listed twice", ""),
    "clash": (
        "  - vae_tiling\n",
        "  - model_offload\n",
        "10:5: model_offload and group_offload cannot be combined",
        "keep group_offload",
    ),
    "two-names-in-a-step": ("  - dtype: auto\n", "  - {dtype: auto, vae_slicing: {}}\n", "one name is wanted here", ""),
    "no-optimizers": (
        GOOD[GOOD.index("optimizers") :],
        "optimizers: []\n",
        "7:13: the list holds 0, and needs at least 1",
        "",
    ),
    "missing": ("summary: ours\n", "", "1:1: the key 'summary' is missing", ""),
    "tab": ("  - vae_tiling", "\t- vae_tiling", "9:1: found a tab character that indents", "never with tabs"),
    "duplicate-key": (
        "summary: ours",
        "summary: ours\nname: other",
        "the key 'name' is here twice (first on line 2)",
        "",
    ),
    "not-a-mapping": (GOOD, "- a\n- b\n", "1:1: ", "is not a mapping"),
    "empty": (GOOD, "", "is not a mapping", ""),
    "bomb": (GOOD, BOMB, "values once its aliases are followed", ""),
    "tag": ("ours", "!!python/name:os.system", "is not allowed", ""),
    "order": (
        "  - vae_tiling\n  - group_offload: {type: block_level, blocks_per_group: 2, use_stream: false}\n",
        "  - sequential_offload\n  - layerwise_casting\n",
        "9:5: layerwise_casting must come before sequential_offload",
        "list layerwise_casting before",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_with_file_line_and_column(tmp_path: Path, name: str) -> None:
    old, new, why, more = BAD[name]
    assert old in GOOD
    path = write(tmp_path, "bad.yaml", GOOD.replace(old, new, 1))
    with pytest.raises(ProfileError) as caught:
        profiles.find(str(path))
    told = str(caught.value)
    assert why in told
    assert more in told
    assert str(path) in caught.value.why


def test_all_mistakes_are_told_at_once_in_their_order(tmp_path: Path) -> None:
    text = GOOD.replace("team", "Team!").replace("auto", "int8").replace("vae_tiling", "tiling")
    with pytest.raises(ProfileError) as caught:
        profiles.load(write(tmp_path, "bad.yaml", text), "bad.yaml")
    found = [line for line in caught.value.why.splitlines() if "bad.yaml:" in line]
    assert [line.rpartition("bad.yaml:")[2].split(":")[0] for line in found] == ["2", "8", "9"]


def test_what_is_wrong_in_one_place_hides_nothing_in_another(tmp_path: Path) -> None:
    text = GOOD.replace("7.2GiB", "0GiB").replace("  - vae_tiling\n", "  - model_offload\n").replace("1.2.3", "1.2")
    text = text.replace("summary", "fallback: nobody\nsummary") + "prefer: sped\n"
    with pytest.raises(ProfileError) as caught:
        profiles.load(write(tmp_path, "bad.yaml", text), "bad.yaml")
    for said in ("3:10: 1.2 is", "4:11: there is no", "7:25: '0GiB'", "11:5: model_offload and", "12:9: 'sped'"):
        assert said in caught.value.why


def test_the_line_is_shown_with_a_caret(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as caught:
        profiles.load(write(tmp_path, "bad.yaml", GOOD.replace("vae_tiling", "tiling")), "bad.yaml")
    shown = caught.value.why.splitlines()
    assert shown[1].endswith("| " + "  - tiling")
    assert shown[2].endswith("| " + "    ^")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ProfileError, match="did you mean 'medium'"):
        profiles.find("meduim")


def test_what_cannot_be_read_is_a_profile_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ProfileError):
            profiles.load(path, str(path))


def test_a_valid_file_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, "team.yaml", GOOD)
    profiles.load(path, "team.yaml")
    assert len(list((tmp_path / "cache" / "valid").iterdir())) >= 1
    write(tmp_path, "team.yaml", GOOD.replace("auto", "int8"))
    with pytest.raises(ProfileError):
        profiles.load(path, "team.yaml")


def test_a_value_is_parsed_once_and_anew_when_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, "team.yaml", GOOD)
    made = documents.read(path).value
    assert validation.value_once(path, "profile") == made
    with monkeypatch.context() as without:
        without.delattr(validation, "parse")
        assert validation.value_once(path, "profile") == made
    write(tmp_path, "team.yaml", GOOD + "colour: red\n")
    with pytest.raises(documents.DocumentError, match="colour"):
        validation.value_once(path, "profile")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DG_RUN_CACHE", str(write(tmp_path, "a-file", "") / "below"))
    assert profiles.load(write(tmp_path, "team.yaml", GOOD), "team.yaml").name == "team"


def test_the_committed_schema_is_the_generated_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.make_schemas", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted(paths.data_dir("schema").glob("*.schema.json")), ids=lambda p: p.stem)
def test_a_schema_is_one_of_the_draft_that_it_says(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", sorted(paths.data_dir("profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_first_line_of_a_built_in_profile_leads_an_editor_to_the_schema(path: Path) -> None:
    marked, target = path.read_text(encoding="utf-8").splitlines()[0].split("$schema=")
    assert marked == "# yaml-language-server: "
    assert (path.parent / target).resolve() == paths.data_dir("schema") / "profile.schema.json"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("1.0.0", True),
        ("0.0.0-0", True),
        ("1.0.0-alpha.1+build.5", True),
        ("1.0.0+001", True),
        ("1.0.0--", True),
        ("1.0", False),
        ("01.0.0", False),
        ("1.0.0-01", False),
        ("1.0.0-a..b", False),
        ("1.0.0+", False),
        (" 1.0.0", False),
    ],
)
def test_versions_are_semantic(tmp_path: Path, text: str, is_one: bool) -> None:
    path = write(tmp_path, "team.yaml", GOOD.replace("1.2.3", json.dumps(text)))
    if is_one:
        assert profiles.load(path, "x").version == text
    else:
        with pytest.raises(ProfileError, match="is not a semantic version"):
            profiles.load(path, "x")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ('"8 GB"', 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("512mib", 2**29)],
)
def test_sizes_have_units_and_gb_is_not_gib(tmp_path: Path, text: str, size_bytes: int) -> None:
    path = write(tmp_path, "team.yaml", GOOD.replace("7.2GiB", text))
    assert profiles.load(path, "x").match.free_vram_at_least_bytes == size_bytes
