"""A lock held against a machine: each thing that changed is named, old and new, and only what matters refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import cli, drift, facts, lock, probe, profiles, validation, versions
from engine import plan as plans
from engine.check import OTHERWISE
from engine.drift import Drift
from engine.errors import HardwareError, IncompatibleError, ModelError, NothingFitsError
from engine.facts import embedded
from engine.units import GIB, MIB
from engine.values import Driver, FrozenDict, Hardware, Step
from tests.conftest import RTX_4090, card, machine, write
from tests.test_locks import with_card
from tests.test_profiles import GOOD

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(scope="module")
def locked() -> engine.Lock:
    return lock.of(engine.resolve(hardware=with_card()))


def differing(made: engine.Lock, hardware: Hardware) -> dict[str, Drift]:
    found = made.drift(hardware)
    assert len({d.name for d in found}) == len(found)
    assert all(d.because and d.severity in ("refuse", "warn") for d in found)
    assert all((d.exit_code is not None) == (d.severity == "refuse") for d in found)
    return {d.name: d for d in found}


def test_on_the_same_machine_nothing_differs(locked: engine.Lock) -> None:
    hardware = with_card(21.7, index=1)
    assert locked.drift(hardware) == ()
    plan = locked.plan(hardware)
    assert plan.digest == locked.plan_digest
    assert plan.optimizers == locked.optimizers
    assert plan.profile == engine.resolve(hardware=hardware).profile
    assert plan.fits is True
    assert engine.Plan.from_json(plan.to_json()) == plan


def test_a_plan_of_a_lock_is_the_plan_that_was_locked(locked: engine.Lock) -> None:
    here = with_card()
    again, first = locked.plan(here), engine.resolve(hardware=here)
    for name in (
        "request",
        "optimizers",
        "profile",
        "estimate",
        "device",
        "digest",
        "versions",
        "fits",
        "budget_bytes",
    ):
        assert getattr(again, name) == getattr(first, name), name


def test_a_lock_of_the_plan_of_a_lock_is_that_lock(locked: engine.Lock) -> None:
    assert lock.of(locked.plan(with_card(20.0))) == locked


def test_the_order_of_a_profile_is_kept(tmp_path: Path) -> None:
    text = GOOD.replace("  - vae_tiling\n", "")
    path = write(tmp_path, "team.yaml", text)
    made = lock.of(engine.resolve(hardware=with_card(), profile=str(path)))
    assert made.plan(with_card()).optimizers == made.optimizers


def test_another_card_is_refused_unless_it_is_proven_to_fit(locked: engine.Lock) -> None:
    other = with_card(11.0, name="GeForce RTX 3060")
    other = dataclasses.replace(other, gpus=(dataclasses.replace(other.gpus[0], arch="8.6", total_bytes=12 * GIB),))
    found = differing(locked, other)
    assert {n: (d.old, d.new, d.severity) for n, d in found.items() if n.startswith("GPU")} == {
        "GPU": (RTX_4090, "GeForce RTX 3060", "warn"),
        "GPU architecture": ("8.9", "8.6", "warn"),
        "GPU memory bytes": (24 * GIB, 12 * GIB, "warn"),
    }
    assert [n.kind for n in locked.plan(other).notes].count("drift") == len(found)
    assert f"GPU: {RTX_4090}, now GeForce RTX 3060" in locked.plan(other).explain()
    unknown = dataclasses.replace(other, gpus=(dataclasses.replace(other.gpus[0], arch=None),))
    assert differing(locked, unknown)["GPU"].severity == "refuse"
    with pytest.raises(HardwareError, match="whether it fits here is not known"):
        locked.plan(unknown)
    full = dataclasses.replace(other, gpus=(dataclasses.replace(other.gpus[0], free_bytes=GIB // 2),))
    assert differing(locked, full)["GPU"].exit_code == 4


def test_of_several_cards_the_locks_own_kind_is_taken(locked: engine.Lock) -> None:
    big = card(40.0, index=0, name="NVIDIA A100-SXM4-80GB", arch="8.0")
    mine = card(9.0, index=1, name="NVIDIA GeForce RTX 4090")  # as NVML has it
    hardware = dataclasses.replace(machine(big, mine), driver=Driver(version="580.65.06", cuda="13.0"))
    assert locked.drift(hardware) == ()
    chosen = locked.plan(hardware).card
    assert chosen is not None
    assert chosen.index == 1


def test_no_card_at_all_is_refused(locked: engine.Lock) -> None:
    with pytest.raises(HardwareError) as caught:
        locked.plan(machine())
    assert f"GPU: {RTX_4090}, now none (no NVIDIA driver was found)" in str(caught.value)


def test_a_refusal_names_everything_that_differs(locked: engine.Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(embedded.model(), revision="0123456789ab")
    monkeypatch.setattr(facts, "find", lambda *_: changed)
    now = dict(versions.snapshot()) | {"torch": "3.0.0"}
    monkeypatch.setattr(versions, "snapshot", lambda: now)
    with pytest.raises(ModelError) as caught:
        locked.plan(machine())
    first, second, third = caught.value.why.splitlines()
    assert first.startswith("model revision: ")
    assert second.strip().startswith(f"GPU: {RTX_4090}, now none")
    assert third.strip().startswith("beside that, torch: 2.13")


@pytest.mark.parametrize("short", [1, 300 * MIB])
def test_too_little_free_memory_is_refused_by_how_many_bytes(locked: engine.Lock, short: int) -> None:
    required = locked.estimate.required_bytes
    assert required is not None
    free = required + 512 * MIB - short
    seen = with_card()
    hardware = dataclasses.replace(seen, gpus=(dataclasses.replace(seen.gpus[0], free_bytes=free),))
    (found,) = locked.drift(hardware)
    assert (found.name, found.old, found.new, found.exit_code) == ("free VRAM bytes", required + 512 * MIB, free, 4)
    with pytest.raises(NothingFitsError, match=f"{short:,} bytes"):
        locked.plan(hardware)
    enough = dataclasses.replace(seen, gpus=(dataclasses.replace(seen.gpus[0], free_bytes=free + short),))
    assert locked.drift(enough) == ()


def test_too_little_host_memory_is_refused(locked: engine.Lock) -> None:
    seen = with_card()
    hardware = dataclasses.replace(seen, host=dataclasses.replace(seen.host, ram_bytes=MIB))
    (found,) = locked.drift(hardware)
    assert (found.name, found.new, found.exit_code) == ("free host bytes", MIB, 4)


def test_another_driver_is_a_warning(locked: engine.Lock) -> None:
    hardware = dataclasses.replace(with_card(), driver=Driver(version="590.10", cuda="13.1"))
    (found,) = locked.drift(hardware)
    assert (found.name, found.old, found.new, found.severity) == ("driver", "580.65.06", "590.10", "warn")
    assert locked.plan(hardware).fits is True


@pytest.mark.parametrize(
    ("name", "new", "part"),
    [
        ("torch", "2.13.9", "a patch"),
        ("diffusers", "0.43.0", "estimated again"),
        ("transformers", "6.0.0", "estimated again"),
        ("accelerate", None, "not installed"),
    ],
)
def test_other_libraries_are_a_warning(
    locked: engine.Lock, monkeypatch: pytest.MonkeyPatch, name: str, new: str | None, part: str
) -> None:
    now = dict(versions.snapshot()) | {name: new}
    monkeypatch.setattr(versions, "snapshot", lambda: now)
    (found,) = locked.drift(with_card())
    assert (found.name, found.new, found.severity) == (name, new, "warn")
    assert found.old == locked.stands_on.versions[name]
    assert part in found.because


def test_another_dg_run_is_a_warning(locked: engine.Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "__version__", "9.0.0")
    (found,) = locked.drift(with_card())
    assert (found.name, found.new, found.severity) == ("dg-run", "9.0.0", "warn")


def test_an_optimizer_that_this_version_does_not_know(locked: engine.Lock) -> None:
    first, *rest = locked.optimizers
    for other, part in (
        (Step(name="vae_folding"), "there is no optimizer 'vae_folding'"),
        (Step(name="vae_slicing", params=FrozenDict(folds=2)), "has no parameter 'folds'"),
        (Step(name="group_offload", params=FrozenDict(type="leaf_level")), "has other parameters now"),
    ):
        with pytest.raises(IncompatibleError, match="does not know all of it") as caught:
            dataclasses.replace(locked, optimizers=(first, other, *rest)).plan(with_card())
        assert part in caught.value.why


def test_another_revision_is_refused(locked: engine.Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(embedded.model(), revision="0123456789ab")
    monkeypatch.setattr(facts, "find", lambda *_: changed)
    (found,) = locked.drift(with_card())
    assert (found.name, found.old, found.new) == ("model revision", embedded.model().revision, "0123456789ab")
    with pytest.raises(ModelError, match="model revision"):
        locked.plan(with_card())


def a_model(folder: Path, **config: Any) -> Path:
    """Write a model of configurations alone."""
    for name, content in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]},
        "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64]} | config,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a function that puts a commit of an/other into the cache and moves main to it; offline."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--an--other"

    def commit(letter: str, **config: Any) -> None:
        a_model(repository / "snapshots" / (letter * 40), **config)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(letter * 40)

    return commit


def test_a_branch_that_moved_on_is_a_warning_and_the_locked_commit_is_run(hub: Callable[..., None]) -> None:
    hub("a")
    made = lock.of(engine.resolve("an/other", device="cpu", hardware=machine()))
    assert made.stands_on.model.revision == "a" * 40
    assert made.drift(machine()) == ()
    hub("b")
    (found,) = made.drift(machine())
    assert (found.name, found.old, found.new, found.severity) == ("model main", "a" * 40, "b" * 40, "warn")
    assert made.plan(machine()).request.revision == "a" * 40


def test_a_commit_that_cannot_be_had_is_refused(hub: Callable[..., None], tmp_path: Path) -> None:
    hub("a")
    made = lock.of(engine.resolve("an/other", device="cpu", hardware=machine()))
    hub("b")
    (tmp_path / "hub" / "models--an--other" / "snapshots" / ("a" * 40) / "model_index.json").unlink()
    (found,) = made.drift(machine())
    assert (found.name, found.old, found.new, found.exit_code) == ("model revision", "a" * 40, "b" * 40, 5)


def test_a_directory_whose_configuration_changed_is_refused(tmp_path: Path) -> None:
    folder = a_model(tmp_path / "mine")
    made = lock.of(engine.resolve(folder, device="cpu", hardware=machine()))
    assert made.drift(machine()) == ()
    a_model(folder, latent_channels=16)
    (found,) = made.drift(machine())
    assert (found.name, found.exit_code) == ("model configuration", 5)
    (folder / "model_index.json").unlink()
    with pytest.raises(ModelError):
        made.drift(machine())


def test_a_lock_by_the_catalogue_is_run_when_the_model_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lock.of(engine.resolve(FLUX, hardware=with_card()))
    assert made.stands_on.model.revision is None
    here = dataclasses.replace(facts.find(FLUX), revision="c" * 40, source="cache")
    monkeypatch.setattr(facts, "find", lambda *_: here)
    assert [(d.name, d.new, d.severity) for d in made.drift(with_card())] == [("model revision", "c" * 40, "warn")]


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_profile_that_changed_is_a_warning_and_the_locks_own_list_is_run(tmp_path: Path) -> None:
    path = write(tmp_path, "team.yaml", GOOD)
    made = lock.of(engine.resolve(hardware=with_card(), profile=str(path)))
    assert made.profile is not None
    assert (made.profile.source, made.profile.version) == ("file", "1.2.3")
    assert made.drift(with_card()) == ()
    edited(path, "vae_tiling", "vae_slicing")
    (found,) = made.drift(with_card())
    assert (found.name, found.severity) == ("profile team content", "warn")
    assert "under its old version 1.2.3" in found.because
    edited(path, "1.2.3", "1.3.0")
    (found,) = made.drift(with_card())
    assert (found.name, found.old, found.new, found.severity) == ("profile team", "1.2.3", "1.3.0", "warn")
    path.unlink()
    (found,) = made.drift(with_card())
    assert (found.new, found.severity) == (None, "warn")
    assert made.plan(with_card()).optimizers == made.optimizers


def test_a_teams_profile_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    path = write(tmp_path / "profiles", "team.yaml", GOOD)
    monkeypatch.chdir(tmp_path)
    made = lock.of(engine.resolve(hardware=with_card(), profile="team"))
    assert made.profile is not None
    assert (made.profile.name, made.profile.source) == ("team", "file")
    assert made.profile.content is not None
    assert str(tmp_path) not in made.text()
    plan = made.plan(with_card())
    assert (lock.of(plan), made.check(with_card()).facts) == (made, ())
    edited(path, "1.2.3", "1.2.4")
    assert [d.name for d in made.drift(with_card())] == ["profile team"]
    monkeypatch.chdir(tmp_path / "profiles")  # where there is no such folder
    (found,) = made.drift(with_card())
    assert (found.name, found.new, found.severity) == ("profile team", None, "warn")


def test_a_profile_that_another_one_fell_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    first = GOOD.replace("name: team", "name: first") + "fallback: team\n"
    write(tmp_path / "profiles", "first.yaml", first)
    write(tmp_path / "profiles", "team.yaml", GOOD)
    monkeypatch.chdir(tmp_path)
    asked = engine.resolve(hardware=with_card(), profile="first")
    back = dataclasses.replace(asked, profile=engine.resolve(hardware=with_card(), profile="team").profile)
    made = lock.of(dataclasses.replace(back, digest=plans.digest(back.request, back.profile, back.optimizers)))
    assert made.profile is not None
    assert made.profile.name == "team"
    assert made.drift(with_card()) == ()


def test_a_profiles_words_are_not_its_content(tmp_path: Path) -> None:
    path = write(tmp_path, "team.yaml", GOOD)
    first = lock.profile_content(profiles.find(str(path)))
    path.write_text("# a comment\n" + GOOD.replace("summary: ", "summary: now "))
    assert lock.profile_content(profiles.find(str(path))) == first


def test_a_cap_is_kept_and_never_makes_an_imagined_card() -> None:
    made = lock.of(engine.resolve(hardware=with_card(23), vram="20GiB"))
    plan = made.plan(with_card(23))
    assert plan.budget_bytes == 20 * GIB - 512 * MIB
    plan = made.plan(with_card(19))
    assert plan.request.vram_bytes == 20 * GIB
    assert plan.card is not None
    assert not plan.card.hypothetical
    assert plan.budget_bytes == 19 * GIB - 512 * MIB


def test_a_lock_for_an_imagined_card_is_run_on_a_real_one() -> None:
    made = lock.of(engine.resolve(hardware=machine(), gpu="RTX 4090"))
    assert made.stands_on.driver is None
    real = with_card(22.5, name="NVIDIA GeForce RTX 4090")
    nvml = dataclasses.replace(real.gpus[0], total_bytes=24564 * MIB)
    assert made.drift(dataclasses.replace(real, gpus=(nvml,))) == ()


def test_a_lock_for_the_cpu_leaves_a_card_alone() -> None:
    made = lock.of(engine.resolve(hardware=machine()))
    plan = made.plan(with_card())
    assert (plan.device, made.drift(with_card())) == (None, ())
    assert plan.profile is not None
    assert plan.profile.name == "cpu"


def test_what_a_call_says_itself_stays() -> None:
    made = lock.of(engine.resolve(hardware=machine(), call={"num_inference_steps": 3}))
    assert made.plan(machine()).request.call["num_inference_steps"] == 3


def test_a_version_that_digests_plans_otherwise_is_a_warning(locked: engine.Lock) -> None:
    older = dataclasses.replace(locked, plan_digest="sha256:" + "0" * 64)
    (found,) = older.drift(with_card())
    assert (found.name, found.severity) == ("plan digest", "warn")
    plan = older.plan(with_card())
    assert engine.Plan.from_json(plan.to_json()) == plan


# --check


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hardware], None]]:
    def is_here(hardware: Hardware) -> None:
        monkeypatch.setattr(probe, "snapshot", lambda: hardware)

    is_here(machine())
    yield is_here


def test_a_check_on_the_same_card_and_on_none(locked: engine.Lock) -> None:
    found = locked.check(with_card(20.0))
    assert (found.exit_code, found.facts, found.hypothetical, found.fits) == (0, (), False, True)
    found = locked.check(machine())
    assert (found.exit_code, found.facts, found.hypothetical, found.fits) == (0, (), True, True)
    assert found.again is not None
    assert found.again.digest == locked.plan_digest


def test_the_host_of_a_check_without_the_card_is_the_locks(locked: engine.Lock) -> None:
    small = machine()
    small = dataclasses.replace(small, host=dataclasses.replace(small.host, ram_bytes=MIB, total_ram_bytes=MIB))
    assert locked.check(small).exit_code == 0


def test_a_check_says_what_would_be_planned_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, "team.yaml", GOOD)
    made = lock.of(engine.resolve(hardware=with_card(), profile=str(path)))
    edited(path, "vae_tiling", "vae_slicing")
    found = made.check(with_card())
    assert found.exit_code == OTHERWISE == 3
    facts_ = {f.name: f for f in found.facts}
    assert "vae_tiling" in str(facts_["optimizers"].old)
    assert "vae_slicing" in str(facts_["optimizers"].new)
    edited(path, "schema", "schemata")
    assert made.check(with_card()).exit_code == 3
    path.unlink()
    assert made.check(with_card()).exit_code == 3


def test_a_check_says_when_it_no_longer_fits(locked: engine.Lock) -> None:
    found = locked.check(with_card(0.4))
    assert (found.exit_code, found.fits) == (4, False)


@pytest.mark.parametrize(
    ("model", "free_gib"),
    [(None, 12), pytest.param("stabilityai/sdxl-turbo", 8, marks=pytest.mark.slow)],
)
def test_a_choice_that_only_free_memory_explains_is_no_failure(model: str | None, free_gib: float) -> None:
    # Locked where neighbours had much of the card and the host: with all of it free there is a better choice.
    made = lock.of(engine.resolve(model, hardware=with_card(free_gib)))
    for where in (machine(), with_card(23.5)):
        found = made.check(where)
        assert found.exit_code == 0
        assert {f.severity for f in found.facts} <= {"warn"}
        assert all("free" in f.because for f in found.facts if f.name == "optimizers")


def test_a_choice_that_the_request_explains_is_a_failure() -> None:
    made = lock.of(engine.resolve("stabilityai/sdxl-turbo", hardware=machine(), gpu="RTX 4090", host_ram="32GiB"))
    (placement,) = (s for s in made.optimizers if s.name == "resident")
    slower = tuple(Step(name="model_offload") if s is placement else s for s in made.optimizers)
    found = dataclasses.replace(made, optimizers=slower).check(machine())
    assert found.exit_code == OTHERWISE


def test_a_check_where_the_commit_cannot_be_had_goes_by_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    find = facts.find
    known = dataclasses.replace(find(FLUX), revision="c" * 40, source="cache")
    monkeypatch.setattr(facts, "find", lambda *_: known)
    made = lock.of(engine.resolve(FLUX, hardware=with_card()))
    monkeypatch.setattr(facts, "find", find)
    found = made.check(with_card())
    assert found.exit_code == 0
    assert [(f.name, f.new, f.severity) for f in found.facts] == [("model revision", None, "warn")]
    assert made.drift(with_card())[0].severity == "refuse"  # for a run its weights are needed


def test_a_check_of_an_exact_list() -> None:
    listed: list[Any] = [{"name": "dtype", "params": {"value": "bfloat16"}}, "model_offload"]
    made = lock.of(engine.resolve(hardware=with_card(), optimizers=listed))
    assert made.check(machine()).exit_code == 0
    assert made.check(with_card(0.4)).exit_code == 4


# The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def test_lock_and_check_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, here: Callable[[Hardware], None]
) -> None:
    first, second = tmp_path / "plan.yaml", tmp_path / "plan.json"
    code, out, err = run(capsys, "plan", "--gpu", "RTX 4090", "--lock", str(first))
    assert (code, err) == (0, f"the lock is in {first}\n")
    assert "profile" in out
    code, out, _ = run(capsys, "plan", "--gpu", "RTX 4090", "--json", "--lock", str(second))
    assert json.loads(out)["digest"] == engine.read_lock(second).plan_digest
    assert engine.read_lock(first) == engine.read_lock(second)
    code, out, err = run(capsys, "plan", "--check", str(first))
    assert (code, err) == (0, "")
    assert out == f"{first}, on {RTX_4090} (imagined): it fits, and it would be planned so again\n"
    here(with_card(0.5))
    code, out, _ = run(capsys, "plan", "--check", str(second), "--json")
    said = json.loads(out)
    assert (code, said["exit_code"], said["fits"]) == (4, 4, False)
    assert said["facts"][0]["name"] == "free VRAM bytes"
    code, out, _ = run(capsys, "plan", "--check", str(first))
    assert code == 4
    assert "it no longer fits\n  refuse  free VRAM bytes: " in out


def test_a_lock_that_nothing_fits_is_not_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, here: Callable[[Hardware], None]
) -> None:
    code, out, err = run(capsys, "plan", "--vram", "2GiB", "--lock", str(tmp_path / "plan.yaml"))
    assert (code, err) == (4, "")
    assert "short" in out
    assert list(tmp_path.iterdir()) == []


def test_a_bad_place_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.resolve", lambda **_: pytest.fail("it was planned"), raising=False)
    write(tmp_path, "notes.yaml", "mine: true\n")
    for place, code in (("plan.txt", 2), ("notes.yaml", 8), ("no/plan.yaml", 8), (".", 2)):
        assert run(capsys, "plan", "--lock", str(tmp_path / place))[0] == code


@pytest.mark.parametrize("command", [["--prompt", "x", "--plan"], ["plan", "--check"]])
def test_a_lock_that_was_edited_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, here: Callable[[Hardware], None], command: list[str]
) -> None:
    path = tmp_path / "plan.yaml"
    run(capsys, "plan", "--gpu", "RTX 4090", "--lock", str(path))
    edited(path, "steps: 8", "steps: 4")
    code, out, err = run(capsys, *command, str(path))
    assert (code, out) == (8, "")
    assert "the lock's digest does not match its content" in err
    assert "\n  do:  " in err


def test_a_run_of_a_lock_that_does_not_stand_is_refused_before_torch(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    here: Callable[[Hardware], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "plan.yaml"
    run(capsys, "plan", "--gpu", "RTX 4090", "--lock", str(path))
    monkeypatch.setattr("engine.run.load.load", lambda *_: pytest.fail("it was loaded"))
    code, out, err = run(capsys, "--plan", str(path), "--prompt", "x")
    assert (code, out) == (6, "")
    assert f"GPU: {RTX_4090}, now none" in err
    here(with_card(0.5))
    code, _, err = run(capsys, "--plan", str(path), "--prompt", "x")
    assert code == 4
    assert "free VRAM bytes" in err


def test_what_is_free_is_read_again_just_before_loading(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    here: Callable[[Hardware], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "plan.yaml"
    run(capsys, "plan", "--gpu", "RTX 4090", "--lock", str(path))
    free = iter([23.0, 0.5])
    monkeypatch.setattr(probe, "snapshot", lambda: with_card(next(free)))
    monkeypatch.setattr("engine.run.load.load", lambda *_: pytest.fail("it was loaded"))
    code, _, err = run(capsys, "--plan", str(path), "--prompt", "x", "--output", str(tmp_path / "x.png"))
    assert code == 4, err
    assert "free VRAM bytes: " in err


def test_what_differs_is_told_before_loading(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    here: Callable[[Hardware], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "plan.yaml"
    here(with_card())
    run(capsys, "plan", "--lock", str(path))
    here(dataclasses.replace(with_card(), driver=Driver(version="590.10", cuda="13.1")))

    def loaded(*_: Any, **__: Any) -> None:
        raise ModelError("that is all")

    monkeypatch.setattr("engine.run.load.load", loaded)
    code, _, err = run(capsys, "--plan", str(path), "--prompt", "x", "--output", str(tmp_path / "x.png"))
    assert code == 5
    assert "driver: 580.65.06, now 590.10" in err


def test_a_locked_run_draws_the_same_pixels(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, here: Callable[[Hardware], None]
) -> None:
    from PIL import Image

    sized = ["--num_inference_steps", "2", "--height", "64", "--width", "64"]
    job = ["--prompt", "a red circle on a blue background", "--seed", "7"]
    path = tmp_path / "plan.yaml"
    assert run(capsys, "plan", *sized, "--lock", str(path))[0] == 0
    assert run(capsys, "--auto", *sized, *job, "--output", str(tmp_path / "a.png"))[0] == 0
    code, out, err = run(capsys, "--plan", str(path), *job, "--output", str(tmp_path / "b.png"))
    assert (code, out) == (0, f"{tmp_path / 'b.png'}\n"), err
    one, two = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert one.tobytes() == two.tobytes()
    assert two.info["plan_digest"] == one.info["plan_digest"] == engine.read_lock(path).plan_digest


def test_every_kind_of_note_is_in_the_plans_schema() -> None:
    kinds = json.loads(validation.schema_text("plan"))["properties"]["notes"]["items"]["properties"]["kind"]["enum"]
    assert {"drift", "calibration", "remembered"} <= set(kinds)
    assert drift.REFUSE == "refuse"
