"""Whose policy goes on: steps, parents and keys under `policy: sft`, `subtask` and `rl`, and where rl starts from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from prts_core.cli.main import main
from prts_core.config.load import load_plan
from prts_core.config.rl import RlConfig
from prts_core.delivery import registry, resolve
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import write_json, write_text
from prts_core.stages import chain, declarations
from prts_core.stages.policies import RL_CHECKPOINT, policy_of, start_policy
from prts_core.store.sources import files_read
from prts_core.store.stage import StageContext
from prts_core.tracking import store as tracking

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
DATA = ("collect", "convert", "validate", "stats")
LAST = ("benchmark", "value", "package")


def steps(*typed: str) -> list[str]:
    return [stage for stage, _ in declarations.steps(load_plan(RECIPE, typed))]


def parents(stage: str, *typed: str) -> list[tuple[str, str | None]]:
    """(stage, partition) of the parents, each of which plays the role of its name."""
    found = declarations.STAGES[stage].parents(load_plan(RECIPE, typed), None)
    assert all(parent.role == parent.stage for parent in found)
    return [(parent.stage, parent.partition) for parent in found]


def keys(folder: Path, *typed: str) -> dict[str, str]:
    plan, results = load_plan(RECIPE, typed), chain.store(folder)
    return {stage: results.resolve(stage, plan, partition).key for stage, partition in declarations.steps(plan)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


DEPLOYED = "metaworld_smoke"
SFT, CONVERT = ("sft", DEPLOYED), ("convert", DEPLOYED)


# ---- steps and parents -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "middle"),
    [
        ([], ["pretrain", "sft", "subtask"]),
        (["policy=subtask"], ["pretrain", "sft", "subtask"]),
        (["policy=rl"], ["pretrain", "sft", "rl"]),
        (["policy=rl", "rl.start=subtask"], ["pretrain", "sft", "subtask", "rl"]),
        (["policy=rl", "rl.checkpoint=/somewhere"], ["rl"]),
        (["policy=rl", "sft.checkpoint=/somewhere"], ["sft", "rl"]),
        (["policy=rl", "rl.preset=elsewhere", "rl.presets={elsewhere: {checkpoint: /somewhere}}"], ["rl"]),
    ],
)
def test_only_what_the_policy_needs_is_run(typed: list[str], middle: list[str]) -> None:
    assert steps(*typed) == [*DATA, *middle, *LAST]
    order = list(declarations.STAGES)
    seen: list[tuple[str, str | None]] = []
    for stage, partition in declarations.steps(plan := load_plan(RECIPE, typed)):
        assert {(p.stage, p.partition) for p in declarations.STAGES[stage].parents(plan, partition)} <= set(seen)
        seen.append((stage, partition))
    assert [stage for stage, _ in seen] == sorted((stage for stage, _ in seen), key=order.index)


def test_the_chosen_policy_is_benchmarked_valued_and_packaged() -> None:
    for stage in ("subtask", "rl"):
        made = (stage, None)
        typed = f"policy={stage}"
        assert parents("benchmark", typed) == [CONVERT, SFT, made], "sft's early weights make failures"
        assert parents("value", typed) == [CONVERT, made, ("benchmark", None)]
        assert parents("package", typed) == [made, ("benchmark", None), ("value", None)]
    assert parents("benchmark") == [CONVERT, SFT]
    assert parents("value") == [CONVERT, SFT, ("benchmark", None)]
    assert parents("package") == [SFT, ("benchmark", None), ("value", None)]


def test_reinforcement_learning_starts_where_the_recipe_says() -> None:
    assert parents("rl") == [CONVERT, SFT]
    assert parents("rl", "rl.start=subtask") == [CONVERT, ("subtask", None)]
    assert parents("rl", "policy=rl", "rl.checkpoint=/somewhere") == [CONVERT]
    assert parents("benchmark", "policy=rl", "rl.checkpoint=/somewhere") == [CONVERT, ("rl", None)]


def test_policy_of_takes_the_latest() -> None:
    assert policy_of({"sft": "a", "convert": "b"}) == "a"  # type: ignore[dict-item]
    assert policy_of({"sft": "a", "subtask": "b"}) == "b"  # type: ignore[dict-item]
    assert policy_of({"rl": "c", "subtask": "b"}) == "c"  # type: ignore[dict-item]


# ---- keys ----------------------------------------------------------------------------------------------------------
def test_what_a_recipe_says_of_rl_changes_nothing_where_no_policy_comes_of_it(tmp_path: Path) -> None:
    plain = keys(tmp_path)
    assert keys(tmp_path, "rl.iterations=3", "rl.presets={a: {episodes: 8}}", "policy=sft") == plain
    assert changed(plain, keys(tmp_path, "policy=subtask")) == set(LAST)
    assert changed(plain, keys(tmp_path, "policy=rl")) == {"subtask", "rl", *LAST}


def test_what_changes_reinforcement_learning_changes_what_follows(tmp_path: Path) -> None:
    plain = keys(tmp_path, "policy=rl")
    after = {"rl", *LAST}
    assert changed(plain, keys(tmp_path, "policy=rl", "rl.algorithm.gamma=0.9")) == after
    assert changed(plain, keys(tmp_path, "policy=rl", "rl.suite=metaworld")) == after
    assert changed(plain, keys(tmp_path, "policy=rl", "seed=8")) == set(plain) - set(DATA)
    for typed in (
        "rl.placement.silence=9",
        "rl.checkpoint_every=9",
        "rl.learner.micro_batch=4",
        "rl.presets={a: {episodes: 8}}",
    ):
        assert keys(tmp_path, "policy=rl", typed) == plain, typed


def test_a_preset_is_what_it_says(tmp_path: Path) -> None:
    presets = "rl.presets={fast: {iterations: 7, algorithm: {gamma: 0.9}}, slow: {iterations: 70}}"
    preset = keys(tmp_path, "policy=rl", presets, "rl.preset=fast")
    assert preset == keys(tmp_path, "policy=rl", "rl.iterations=7", "rl.algorithm.gamma=0.9")
    assert preset != keys(tmp_path, "policy=rl", presets, "rl.preset=slow")


def test_the_stage_gets_the_recipes_section_and_the_deployed_dataset() -> None:
    plan = load_plan(RECIPE, ["rl.episodes=16"])
    config = declarations.STAGES["rl"].config(plan, None)
    assert isinstance(config, RlConfig) and (config.dataset, config.episodes) == (DEPLOYED, 16)
    assert config.source == plan.dataset(None).source
    assert declarations.config_json("rl", plan)["source"] == asdict(plan.dataset(None).source)


def test_the_command_line_shows_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", str(RECIPE), "--set", "policy=rl", "--set", "rl.iterations=3", "--outputs", str(tmp_path)]

    def said(*command: str) -> str:
        assert main([*command, *words]) == 0
        return capsys.readouterr().out

    assert "\nrl " in said("status") and "\nrl " in said("chain", "--dry-run")
    assert '"iterations": 3' in said("config", "rl")
    assert "missing" in said("status")
    with pytest.raises(SystemExit):
        main(["rl", "--help"])
    assert "prts rl --set rl.iterations=20" in capsys.readouterr().out
    assert main(["rl", *words]) == 1
    assert "Stage 'convert:metaworld_smoke' has not run yet" in " ".join(capsys.readouterr().err.split())


# ---- a checkpoint --------------------------------------------------------------------------------------------------
NAME = "models:/prts-smoke@champion"


def listed(outputs: Path, checkpoint: str) -> dict[str, str]:
    plan = load_plan(RECIPE, ["policy=rl", f"rl.checkpoint='{checkpoint}'"])
    return files_read(declarations.STAGES["rl"], plan, None, outputs)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A registry in which NAME means the package with `digest`; none where it has no such key."""
    version = {"digest": "sha256:one"}

    def look(client: object, reference: str) -> SimpleNamespace:
        if "digest" not in version:
            raise StageError("No registered model", found=reference)
        assert reference == NAME
        return SimpleNamespace(tags={"prts.package_digest": version["digest"]})

    monkeypatch.setattr(tracking, "has_store", lambda outputs: True)
    monkeypatch.setattr(tracking, "client", lambda outputs: None)
    monkeypatch.setattr(registry, "resolve_version", look)
    return version


def test_the_files_of_a_checkpoint_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "policy"))
    assert listed(tmp_path, "${CHECKPOINT}") == {}, "not here: the stage tells of it"
    write_json(tmp_path / "policy/config.json", {"a": 1})
    first = listed(tmp_path, "${CHECKPOINT}")
    assert first.keys() == {RL_CHECKPOINT}
    write_text(tmp_path / "policy/README.md", "not read")
    assert listed(tmp_path, "${CHECKPOINT}") == first
    write_json(tmp_path / "policy/config.json", {"a": 2})
    assert listed(tmp_path, "${CHECKPOINT}") != first


def test_a_name_of_the_registry_stands_for_the_package_that_it_means(tmp_path: Path, registered: dict) -> None:
    assert listed(tmp_path, NAME) == {RL_CHECKPOINT: "sha256:one"}
    registered["digest"] = "sha256:two"
    assert listed(tmp_path, NAME) == {RL_CHECKPOINT: "sha256:two"}
    registered.clear()
    assert listed(tmp_path, NAME) == {}, "unknown: the stage tells of it"


def test_looking_for_a_name_makes_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    assert listed(tmp_path, NAME) == {}
    assert not list(tmp_path.glob("*.db"))


def started(tmp_path: Path, checkpoint: str | None, files: dict[str, str] | None = None) -> Path:
    config = RlConfig(dataset="d", checkpoint=checkpoint)
    made = SimpleNamespace(folder=lambda outputs: outputs / "parent")
    context = StageContext(tmp_path, tmp_path / "work", 7, "r", None, files=files or {})
    inputs = {"convert": made} if checkpoint else {"convert": None, "sft": made}
    return start_policy(config, inputs, context)  # type: ignore[arg-type]


def test_the_start_is_a_parents_policy_or_the_checkpoints(tmp_path: Path) -> None:
    assert started(tmp_path, None) == tmp_path / "parent"
    (tmp_path / "policy").mkdir()
    assert started(tmp_path, str(tmp_path / "policy")) == tmp_path / "policy"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        started(tmp_path, str(tmp_path / "nowhere"))
    write_text(tmp_path / "policy/manifest.yaml", "not: a manifest")
    with pytest.raises(CheckpointError, match="manifest is malformed"):
        started(tmp_path, str(tmp_path / "policy"))


def test_a_name_that_has_moved_since_the_stage_was_asked_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(folder=tmp_path / "package", content_digest="sha256:two")
    monkeypatch.setattr(resolve, "resolve", lambda reference, outputs: found)
    assert started(tmp_path, NAME, {RL_CHECKPOINT: "sha256:two"}) == tmp_path / "package"
    with pytest.raises(StageError, match=r"sha256:two.*sha256:one"):
        started(tmp_path, NAME, {RL_CHECKPOINT: "sha256:one"})
