"""Parents, edits, fallbacks; and where profiles are looked for."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from engine import profiles
from engine.errors import ProfileError, UsageError
from engine.profiles import places
from engine.values import Profile

HEAD = "schema: dg-run/profile@1\nversion: 1.0.0\nsummary: a test\n"
BASE = (
    HEAD
    + "name: base\nprefer: quality\nfallback: extreme-low\nmatch: {free_vram: {at_least: 8GiB}, pixels: {below: 100}}\n"
    "optimizers:\n"
    "  - dtype: auto\n"
    "  - one_of: [none, vae_tiling]\n"
    "  - one_of:\n"
    "    - resident\n"
    "    - model_offload\n"
    "    - [layerwise_casting, {group_offload: {use_stream: false}}]\n"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of one's own, with an empty ./profiles/."""
    folder = tmp_path / "team" / "project"
    (folder / "profiles").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DG_RUN_CONFIG", str(tmp_path / "config"))
    return folder


def put(folder: Path, name: str, text: str, *, file: str | None = None) -> Path:
    """Write a profile, its name put in where it has none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (file or f"{name}.yaml")
    path.write_text(text if "\nname:" in text else f"{HEAD}name: {name}\n{text}", encoding="utf-8")
    return path


def child(here: Path, text: str) -> Profile:
    put(here / "profiles", "base", BASE)
    put(here / "profiles", "child", f"extends: base\n{text}")
    return profiles.find("child")


def refused(name: str) -> str:
    with pytest.raises(ProfileError) as caught:
        profiles.find(name)
    # As on one line: what is wrong, and what to do about it.
    lines = [line for line in caught.value.why.splitlines() if not line.lstrip().startswith("|")]
    return f"{'; '.join(lines)}; {caught.value.do}"


def shown(profile: Profile) -> list[str]:
    return [str(s) for s in profile.slots]


# What is taken over.


def test_alternatives_are_read(here: Path) -> None:
    put(here / "profiles", "base", BASE)
    profile = profiles.find("base")
    assert shown(profile) == [
        "dtype: auto",
        "one of (none | vae_tiling)",
        "one of (resident | model_offload | layerwise_casting (storage: float8_e4m3fn, compute: auto)"
        " + group_offload (type: leaf_level, use_stream: false, blocks_per_group: 1))",
    ]
    assert [s.name for s in profile.steps] == ["dtype", "resident"]
    assert (profile.prefer, profile.fallback, profile.match.pixels_below) == ("quality", "extreme-low", 100)


def test_a_child_takes_over_everything_it_does_not_say(here: Path) -> None:
    profile, base = child(here, ""), profiles.find("base")
    assert (profile.slots, profile.match, profile.prefer, profile.fallback) == (
        base.slots,
        base.match,
        base.prefer,
        base.fallback,
    )
    assert (profile.extends, profile.overridden) == ("base", ())


def test_scalars_and_match_replace(here: Path) -> None:
    profile = child(here, "prefer: vram\nfallback: null\nmatch: {gpus: ['RTX 40*']}\n")
    assert (profile.prefer, profile.fallback) == ("vram", None)
    assert profile.match.free_vram_at_least_bytes is None
    assert profile.match.gpus == ("RTX 40*",)
    assert profile.overridden == (
        "prefer of base 1.0.0: quality; vram here",
        "fallback of base 1.0.0: extreme-low; none here",
        "match of base 1.0.0: from 8.00 GiB of free VRAM, below 100 pixels; on RTX 40* here",
    )


def test_a_list_of_its_own_replaces_the_whole_list(here: Path) -> None:
    profile = child(here, "optimizers: [resident]\n")
    assert shown(profile) == ["resident"]
    assert profile.overridden[0].startswith("optimizers of base 1.0.0: dtype: auto, one of (none | vae_tiling),")


def test_set_merges_parameters_wherever_the_step_stands(here: Path) -> None:
    profile = child(here, "set: {dtype: float16, group_offload: {type: block_level}}\n")
    assert profile.slots[0].always[0].params == {"value": "float16"}
    assert profile.slots[2].alternatives[2][1].params == {
        "type": "block_level",
        "use_stream": False,
        "blocks_per_group": 1,
    }
    assert profile.overridden == (
        "dtype of base 1.0.0: auto; float16 here",
        "group_offload.type of base 1.0.0: leaf_level; block_level here",
    )


def test_drop_leaves_steps_out_and_empty_places_go(here: Path) -> None:
    profile = child(here, "drop: [dtype, vae_tiling, layerwise_casting, resident]\n")
    assert shown(profile) == [
        "one of (none | model_offload | group_offload (type: leaf_level, use_stream: false, blocks_per_group: 1))"
    ]
    assert profile.overridden[1] == "vae_tiling of base 1.0.0: dropped"


def test_two_alternatives_that_become_one_are_one(here: Path) -> None:
    put(here / "profiles", "base", "optimizers: [dtype: auto, one_of: [model_offload, [vae_tiling, model_offload]]]")
    put(here / "profiles", "child", "extends: base\ndrop: [vae_tiling]\n")
    assert shown(profiles.find("child")) == ["dtype: auto", "model_offload"]


def test_a_grandchild_shows_what_was_overridden_all_the_way_up(here: Path) -> None:
    child(here, "drop: [vae_tiling]\n")
    put(here / "profiles", "grandchild", "extends: child\nset: {dtype: float16}\n")
    assert profiles.find("grandchild").overridden == (
        "vae_tiling of base 1.0.0: dropped",
        "dtype of child 1.0.0: auto; float16 here",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set: {vae_slicing: {}}\n", "vae_slicing has no parameters: write its name"),
        ("set: {group_offload: {size: 2}}\n", "child.yaml:6:23: unknown key 'size'"),
        ("set: {sequential_offload: {}}\n", "child.yaml:6:"),
        ("drop: [vae_slicing]\n", "child.yaml:6:8: base 1.0.0 has no vae_slicing"),
        ("drop: [vae_tilling]\n", "'vae_tilling' is not known here"),
        ("drop: [dtype, vae_tiling, resident, model_offload, layerwise_casting, group_offload]\n", "nothing is left"),
        ("drop: [dtype, dtype]\n", "the list holds something twice"),
        ("set: {dtype: float16}\ndrop: [dtype]\n", "child.yaml:7:8: 'dtype' is set and dropped"),
        ("set: {dtype: int8}\n", "child.yaml:6:14: 'int8' is not known here"),
        ("set: {dtype: float16}\noptimizers: [resident]\n", "6:1: 'set' edits the parent's optimizers"),
        ("drop: [dtype]\noptimizers: [resident]\n", "'drop' edits the parent's optimizers"),
        ("fallback: child\n", "child.yaml:6:11: it falls back to itself"),
        ("fallback: extreme-lo\n", "there is no profile 'extreme-lo' to fall back to; did you mean 'extreme-low'?"),
        ("set: {group_offload: {use_stream: yes}}\n", "write true or false"),
    ],
)
def test_bad_edits(here: Path, text: str, said: str) -> None:
    with pytest.raises(ProfileError):
        child(here, text)
    assert said in refused("child")


def test_edits_need_a_parent(here: Path) -> None:
    put(here / "profiles", "lonely", "set: {dtype: float16}\n")
    assert "5:1: 'set' needs 'extends'" in refused("lonely")
    assert "the key 'optimizers' is missing" in refused("lonely")


def test_what_is_inherited_is_held_against_the_rules(here: Path) -> None:
    put(here / "profiles", "base", "optimizers: [dtype: auto, one_of: [none, model_offload]]")
    put(here / "profiles", "child", "extends: base\ndrop: [dtype]\n")
    assert shown(profiles.find("child")) == ["one of (none | model_offload)"]
    put(here / "profiles", "base", "optimizers: [dtype: float16, layerwise_casting: {compute: auto}, resident]")
    put(here / "profiles", "child", "extends: base\nset: {layerwise_casting: {compute: float32}}\n")
    assert "6:7: layerwise_casting cannot be used here: " in refused("child")


# Chains.


def test_a_parent_that_is_not_there(here: Path) -> None:
    put(here / "profiles", "child", "extends: medum\n")
    assert "5:10: there is no profile 'medum' to extend; did you mean 'medium'?" in refused("child")


def test_a_parent_that_is_not_valid_is_named_with_the_place(here: Path) -> None:
    bad = put(here / "profiles", "base", "optimizers: [vae_tilling]\n")
    put(here / "profiles", "child", "extends: base\n")
    assert f"5:10: its parent base is not valid: {bad}:5:14: 'vae_tilling' is not known here" in refused("child")


def test_extends_that_goes_round_is_refused_in_every_profile_of_the_ring(here: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"), ("e", "e")):
        put(here / "profiles", name, f"extends: {parent}\n")
    assert "it extends itself: a → b → c → a" in refused("a")
    assert "it extends itself: b → c → a → b" in refused("b")
    assert "its parent a is not valid" in refused("d")
    assert "there is no profile 'e' to extend" in refused("e")


def test_fallbacks_that_go_round_are_refused(here: Path) -> None:
    for name, next_ in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")):
        put(here / "profiles", name, f"fallback: {next_}\noptimizers: [resident]\n")
    assert "the fallbacks go round: a → b → c → a" in refused("a")
    assert "the fallbacks go round: d → a → b → c → a" in refused("d")


def test_a_chain_of_fallbacks_is_given_in_its_order(here: Path) -> None:
    put(here / "profiles", "a", "fallback: b\noptimizers: [resident]\n")
    put(here / "profiles", "b", "fallback: low\noptimizers: [model_offload]\n")
    assert [p.name for p in profiles.chain("a")] == ["a", "b", "low", "extreme-low"]
    assert [p.name for p in profiles.chain("cpu")] == ["cpu"]
    given = put(here / "elsewhere", "x", "fallback: y\noptimizers: [resident]\n")
    put(here / "elsewhere", "y", "fallback: a\noptimizers: [resident]\n")
    assert [p.name for p in profiles.chain(str(given))] == ["x", "y", "a", "b", "low", "extreme-low"]


def test_a_fallback_further_down_that_is_not_there_or_not_valid(here: Path) -> None:
    put(here / "profiles", "a", "fallback: b\noptimizers: [resident]\n")
    put(here / "profiles", "b", "fallback: c\noptimizers: [resident]\n")
    assert "there is no profile 'c', which b falls back to" in refused("a")
    put(here / "profiles", "c", "optimizers: []\n")
    assert "its fallback c is not valid" in refused("a")


def test_a_fallback_that_is_taken_over_and_would_be_itself(here: Path) -> None:
    put(here / "profiles", "a", "fallback: b\noptimizers: [resident]\n")
    put(here / "profiles", "b", "extends: a\n")
    assert "5:10: it falls back to itself; write `fallback: null`, or another one" in refused("b")


def test_a_tower_of_ancestors_is_bounded(here: Path) -> None:
    put(here / "profiles", "a0", "optimizers: [resident]\n")
    for i in range(1, 40):
        put(here / "profiles", f"a{i}", f"extends: a{i - 1}\n")
    assert profiles.find("a15").slots
    assert "more than 16 profiles above" in refused("a39")


# Where they lie.


def test_the_order_of_the_search(here: Path, tmp_path: Path) -> None:
    folders = {
        "profiles/low.yaml": here / "profiles",
        str(here.parent / ".dg-run" / "profiles" / "low.yaml"): here.parent / ".dg-run" / "profiles",
        str(tmp_path / "config" / "profiles" / "low.yaml"): tmp_path / "config" / "profiles",
    }
    above = tmp_path / ".dg-run" / "profiles"  # further up than the project's own: not looked into
    for folder in (*folders.values(), above):
        put(folder, "low", "optimizers: [resident]\n")
    put(above, "above", "optimizers: [resident]\n")
    sources = [*folders, "built-in"]
    for i, source in enumerate(folders):
        assert profiles.find("low").source == source
        found = {f.source: f for f in profiles.listed() if f.name == "low"}
        assert found[source].shadows == tuple(sources[i + 1 :])
        assert found["built-in"].shadowed_by == source
        assert [p.source for p in profiles.visible() if p.name == "low"] == [source]
        assert "above" not in [p.name for p in profiles.visible()]
        (folders[source] / "low.yaml").unlink()
    assert profiles.find("low").source == "built-in"


def test_a_source_below_home_does_not_name_its_owner(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    put(tmp_path / "config" / "profiles", "mine", "optimizers: [resident]\n")
    assert profiles.find("mine").source == "~/config/profiles/mine.yaml"


def test_what_is_visible_has_a_fixed_order(here: Path) -> None:
    put(here / "profiles", "z", "match: {free_vram: {at_least: 6GiB}}\noptimizers: [resident]\n")
    put(here / "profiles", "a", "match: {device: cpu}\noptimizers: [resident]\n")
    names = [p.name for p in profiles.visible()]
    shipped = [p.name for p in profiles.built_in()]
    assert names == ["extreme-low", "z", *shipped[1:-1], "a", "cpu"]


def test_a_profile_may_extend_the_built_in_one_of_its_name(here: Path, tmp_path: Path) -> None:
    shipped = profiles.find("low")
    put(here / "profiles", "low", "extends: low\nset: {dtype: float16}\n")
    assert shown(profiles.find("low")) == ["dtype: float16", *shown(shipped)[1:]]
    put(tmp_path / "config" / "profiles", "low", "extends: low\noptimizers: [dtype: auto, resident]\n")
    assert shown(profiles.find("low")) == ["dtype: float16", "resident"]
    assert [line.partition(" of ")[0] for line in profiles.find("low").overridden] == ["optimizers", "dtype"]


def test_a_file_given_by_its_path_sees_those_beside_it_first(here: Path) -> None:
    shipped = profiles.find("low")
    put(here / "profiles", "base", "optimizers: [resident]\n")
    put(here / "other", "base", "optimizers: [model_offload]\n")
    path = put(here / "other", "child", "extends: base\n")
    assert shown(profiles.find(str(path))) == ["model_offload"]
    own = put(here / "profiles", "low", "extends: low\n")
    assert profiles.find(str(own)).slots == shipped.slots
    assert profiles.find("profiles/low.yaml").slots == shipped.slots


def test_two_files_of_one_folder_with_one_name_are_both_refused(here: Path) -> None:
    put(here / "profiles", "a", "optimizers: [resident]\n")
    put(here / "profiles", "a", "optimizers: [model_offload]\n", file="b.yaml")
    assert "4:7: the name 'a' is also that of " in refused("a")
    assert "a" not in [p.name for p in profiles.visible()]
    assert [b.name for b in profiles.broken()] == ["a", "a"]


def test_a_broken_file_breaks_nobody_else_and_nothing_comes_in_its_place(here: Path) -> None:
    put(here / "profiles", "low", "optimizers: [vae_tilling]\n")
    (here / "profiles" / "notes.yml").write_text("schema: dg-run/profile@1\nname: [", encoding="utf-8")
    assert {p.name for p in profiles.built_in()} - {p.name for p in profiles.visible()} == {"low"}
    assert [(b.name, b.path.name) for b in profiles.broken()] == [("low", "low.yaml"), ("notes", "notes.yml")]
    assert "'vae_tilling' is not known here" in refused("low")
    # By name it goes on with its fallbacks, and one of those is broken: then it is told.
    assert "low.yaml" in refused("medium")
    assert profiles.find("cpu").source == "built-in"


def test_files_of_other_programs_are_passed_over_and_those_that_are_no_text_are_not(here: Path) -> None:
    folder = here / "profiles"
    for i, text in enumerate(["", "config: {send: false}\n", "- a\n", "{{ template }}\n", "# later\n"]):
        (folder / f"{i}.yaml").write_text(text, encoding="utf-8")
    assert [b.name for b in profiles.broken()] == ["0"]
    (folder / "wide.yaml").write_text(HEAD, encoding="utf-16")
    (folder / "child.yaml").write_text("name: mine\nextends: low\n", encoding="utf-8")
    assert [b.name for b in profiles.broken()] == ["0", "mine", "wide"]
    with pytest.raises(ProfileError):
        profiles.find("profiles/1.yaml")


def test_what_is_no_file_is_passed_over_and_what_leads_nowhere_is_broken(here: Path) -> None:
    folder = here / "profiles"
    os.mkfifo(folder / "pipe.yaml")  # opening it would wait for ever
    (folder / "folder.yaml").mkdir()
    (folder / ".hidden.yaml").write_text("[", encoding="utf-8")
    (folder / "gone.yaml").symlink_to(folder / "nowhere.yaml")
    assert profiles.broken() == ()
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    assert [b.name for b in profiles.broken()] == ["loop"]
    assert profiles.visible() == profiles.built_in()


def test_a_folder_or_file_that_may_not_be_read_is_said_to_be(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(folder: Any) -> Any:
        if Path(folder) == here / "profiles":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    (found,) = profiles.broken()
    assert found.error is not None
    assert "it cannot be read: " in found.error.why
    monkeypatch.undo()

    def refused_text(path: Path, most: int) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(here)
    put(here / "profiles", "a", "optimizers: [resident]\n")
    monkeypatch.setattr("engine.documents.read_text", refused_text)
    assert [(f.name, f.error and f.error.why.rpartition(": ")[2]) for f in profiles.broken()] == [
        ("a", "Permission denied")
    ]


def test_a_file_of_the_same_name_size_and_time_elsewhere_is_another(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, dtype in (("one", "float16"), ("two", "float32")):
        path = put(here / folder, "a", f"optimizers: [dtype: {dtype}, resident]\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        monkeypatch.chdir(here / folder)
        assert str(profiles.find("./a.yaml").steps[0]) == f"dtype: {dtype}"


def test_a_current_folder_that_is_gone_and_a_user_without_a_home(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DG_RUN_CONFIG", "HOME", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", no_home)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert profiles.visible() == profiles.built_in()


def test_only_one_folder_is_looked_into_when_that_is_asked_for(here: Path) -> None:
    put(here / "profiles", "seen", "optimizers: [resident]\n")
    put(here / "other", "given", "optimizers: [resident]\n")
    with places.only(here / "other"):
        assert {p.name for p in profiles.visible()} - {p.name for p in profiles.built_in()} == {"given"}
    assert {p.name for p in profiles.visible()} - {p.name for p in profiles.built_in()} == {"seen"}


@pytest.mark.parametrize("variable", ["XDG_CONFIG_HOME", "HOME"])
def test_the_users_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DG_RUN_CONFIG")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / "dg-run" if variable == "XDG_CONFIG_HOME" else tmp_path / ".config" / "dg-run"
    put(folder / "profiles", "mine", "optimizers: [resident]\n")
    assert Path(profiles.find("mine").source).expanduser() == folder / "profiles" / "mine.yaml"


@pytest.mark.parametrize(
    "name",
    (
        *("", ".", "/", "a\0b", "a\0.yaml", "a" * 5000, "a" * 5000 + ".yaml", "\ud800", "\ud800.yaml"),
        *("~nobody-here/x.yaml", "/dev/null", "/dev/zero", "profiles/", "low/", "LOW", " low", "low\n", "../low"),
        "C:\\low.yaml",
    ),
)
def test_a_name_that_nothing_can_have_is_refused(here: Path, name: str) -> None:
    with pytest.raises(ProfileError):
        profiles.find(name)


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(UsageError, match="a profile is a name or the path of a file, and not 5"):
        profiles.find(5)  # type: ignore[arg-type]


# What it costs.


def test_a_change_is_seen_at_once(here: Path) -> None:
    for dtype in ("float16", "float32", "auto") * 10:
        put(here / "profiles", "a", f"optimizers: [dtype: {dtype}, resident]\n")
        assert str(profiles.find("a").steps[0]) == f"dtype: {dtype}"


def test_two_hundred_profiles_cost_nothing_when_nothing_changed(here: Path) -> None:
    for i in range(200):
        path = put(here / "profiles", f"p{i}", "extends: low\nset: {dtype: float16}\n")
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert len(profiles.visible()) == 200 + len(profiles.built_in())
    times = []
    for _ in range(20):
        start = time.perf_counter()
        profiles.visible()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005
