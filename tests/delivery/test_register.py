"""The registry against a real MLflow store: versions, aliases through the gate, and runs cut short."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from prts_core.delivery import audit, latency, registry
from prts_core.delivery.gate import policy_episodes
from prts_core.delivery.promote import promote
from prts_core.delivery.resolve import resolve
from prts_core.delivery.suite_results import results_of
from prts_core.delivery.verify import verify_package
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import digest_file, read_json, write_json
from prts_core.policy.policy import load_policy
from prts_core.skills.digests import package_digest
from prts_core.skills.signature import new_key
from prts_core.tracking.store import client, tracking_uri
from tests.fixtures import toy_package
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy
from tests.fixtures.toy_package import (
    CONTRACT,
    PROTOCOL,
    load_toy_policy,
    make,
    named,
    outcomes,
    register,
    write_package,
)


def registration(outputs: Path, recipe: str) -> dict:
    return read_json(outputs / "registrations" / f"{recipe}.json")


def test_a_good_first_policy_becomes_champion_with_every_tag(plan, outputs):
    plan = named(plan, "first")
    made = make(plan, outputs, "w1", outcomes(118))
    told = register(plan, outputs, {"dagster.run_id": "d-9"})
    store = client(outputs)
    assert told == registration(outputs, "first")
    assert told["aliases"] == ["challenger", "champion"] and told["model_uri"] == "models:/first/1"
    digest = package_digest(made["package"].folder(outputs))
    assert (told["package_digest"], told["content_digest"]) == (digest, made["package"].content_digest)
    assert told["verdict"]["promote"] and told["verdict"]["champion"] is None
    assert told["contract_fingerprint"] == CONTRACT.fingerprint

    version = registry.resolve_version(store, "models:/first@champion")
    assert (str(version.version), version.status) == ("1", "READY")
    assert version.tags["prts.package_digest"] == resolve("models:/first@champion", outputs).package_digest == digest
    assert version.tags["prts.content_digest"] == made["package"].content_digest
    assert version.tags["prts.manifest_digest"] == made["package"].digest
    assert json.loads(version.tags["prts.parents"]) == made["package"].parents
    assert version.tags["prts.contract_fingerprint"] == CONTRACT.fingerprint
    assert version.tags["dagster.run_id"] == "d-9" and version.tags["git.sha"]
    own = results_of(version)["benchmark"]
    assert (own.suite, own.successes, own.n, own.protocol_digest) == ("toys", 118, 120, PROTOCOL)
    figures = [name for name, text in version.tags.items() if "118" in text or "0.98" in text]
    assert figures == ["prts.suite.benchmark"] and "0.98" not in version.description + json.dumps(told)
    run = store.get_run(version.run_id)
    assert run.info.run_name == "package" and run.data.metrics["success_rate/benchmark"] == pytest.approx(118 / 120)
    model = store.get_logged_model(version.tags["prts.model_id"])
    assert str(model.status) == "READY" and model.metrics[0].value == pytest.approx(118 / 120)
    verify_package(registry.version_files(outputs, version, registry.PACKAGE))
    episodes = policy_episodes(registry.version_files(outputs, version, registry.EPISODES))
    assert episodes.height == 120 and episodes["success"].sum() == 118


def test_a_weak_first_policy_is_challenger_only(plan, outputs):
    plan = named(plan, "weak")
    make(plan, outputs, "w", outcomes(90))
    register(plan, outputs)
    assert registration(outputs, "weak")["aliases"] == ["challenger"]
    assert registry.version_of_alias(client(outputs), "weak", registry.CHAMPION) is None
    with pytest.raises(StageError, match=r"no alias 'champion'.*@challenger"):
        registry.resolve_version(client(outputs), "models:/weak@champion")


def test_challengers_meet_the_champion_on_the_same_episodes(plan, outputs):
    plan = named(plan, "duel")
    store = client(outputs)

    def enter(weights: str, episodes) -> dict:
        make(plan, outputs, weights, episodes)
        register(plan, outputs)
        return registration(outputs, "duel")

    def holders() -> tuple[int, int]:
        return tuple(int(registry.version_of_alias(store, "duel", a).version) for a in ("champion", "challenger"))

    enter("w1", outcomes(110))
    same = enter("w2", outcomes(109))
    assert same["verdict"] == {
        "promote": True,
        "champion": 1,
        "objections": [],
        "reason": same["verdict"]["reason"],
    } and holders() == (2, 2)
    worse = enter("w3", outcomes(80))
    assert [why for why, _ in worse["verdict"]["objections"]] == ["alarm", "margin", "floor"] and holders() == (2, 3)
    assert worse["verdict"]["champion"] == 2 and worse["aliases"] == ["challenger"]
    assert results_of(registry.resolve_version(store, "models:/duel/3"))["benchmark"].alarm
    other = enter("w4", outcomes(120, first_seed=1))
    assert other["verdict"]["objections"] == [["episodes", "benchmark"]] and holders() == (2, 4)
    make(plan, outputs, "w5", outcomes(120), protocol="sha256:longer")
    assert register(plan, outputs)["verdict"]["objections"] == [["protocol", "benchmark"]] and holders() == (2, 5)
    renamed = replace(CONTRACT, contract=replace(CONTRACT.contract, gripper="open 1"), chunk_length=8)
    make(plan, outputs, "w6", outcomes(120), contract=renamed)
    against = register(plan, outputs)["verdict"]["objections"]
    assert against == [["contract", "gripper"], ["contract", "chunk_length"]] and holders() == (2, 6)
    assert not promote(plan, outputs, contract_change=["gripper"]).promote
    assert promote(plan, outputs, contract_change=["gripper", "chunk_length"]).promote and holders() == (6, 6)


def test_the_same_package_is_registered_once_and_told_alike(plan, outputs):
    plan = named(plan, "again")
    make(plan, outputs, "w1", outcomes(118))
    first = register(plan, outputs)
    again = register(plan, outputs)
    assert again == first | {"verdict": again["verdict"]} and again["verdict"]["objections"] == [["champion", ""]]
    (outputs / "registrations" / "again.json").unlink()
    assert register(plan, outputs) == again and registration(outputs, "again") == again
    assert len(audit.moves(outputs, "again")) == 2
    assert len(client(outputs).search_model_versions("name = 'again'")) == 1


def test_a_benchmark_of_another_policy_is_no_result_of_the_package(plan, outputs, monkeypatch):
    plan = named(plan, "stranger")
    monkeypatch.setattr(toy_package, "toy_report", lambda protocol: report | {"policy_digest": "sha256:11"})
    report = {"suite": "toys", "labels": [], "protocol_digest": PROTOCOL}
    make(plan, outputs, "stranger", outcomes(118))
    with pytest.raises(StageError, match="another policy than the one in the package"):
        register(plan, outputs)


def test_going_back_is_a_rollbacks_business(plan, outputs):
    plan = named(plan, "late")
    make(plan, outputs, "w1", outcomes(118))
    register(plan, outputs)
    make(plan, outputs, "w2", outcomes(119))
    register(plan, outputs)
    make(plan, outputs, "w1", outcomes(118))  # back to the first package: its version and verdict stand already
    told = register(plan, outputs)
    assert told["aliases"] == ["challenger"] and told["verdict"]["objections"] == [["older", ""]]
    store = client(outputs)
    assert int(registry.version_of_alias(store, "late", "champion").version) == 2
    assert int(registry.version_of_alias(store, "late", "challenger").version) == 1


def test_another_registry_is_asked_and_not_a_file(plan, outputs, tmp_path, monkeypatch):
    plan = named(plan, "elsewhere")
    make(plan, outputs, "w1", outcomes(118))
    register(plan, outputs)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(StageError, match="No registered model"):
        registry.resolve_version(client(outputs), "models:/elsewhere@champion")
    assert register(plan, outputs)["aliases"] == ["challenger", "champion"]
    assert int(registry.version_of_alias(client(outputs), "elsewhere", "champion").version) == 1


CUT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.fixtures.toy_package import named, register
from prts_core.config.load import load_plan
from mlflow import MlflowClient

original = getattr(MlflowClient, {method!r})
def cut(*args, **kwargs):
    if {after}:
        original(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(MlflowClient, {method!r}, cut)
outputs = Path({outputs!r})
register(named(load_plan(Path({config!r})), {recipe!r}), outputs)
"""


@pytest.mark.parametrize(
    "method, after",
    [
        pytest.param("log_model_artifacts", False, marks=pytest.mark.slow),
        pytest.param("finalize_logged_model", True, marks=pytest.mark.slow),
        ("create_model_version", True),
        pytest.param("set_registered_model_alias", True, marks=pytest.mark.slow),
        ("set_model_version_tag", True),
    ],
)
def test_a_kill_at_any_moment_leaves_one_version_in_the_end(plan, outputs, method, after):
    recipe = f"cut-{method}"
    renamed = named(plan, recipe)
    make(renamed, outputs, "w1", outcomes(118))
    code = CUT.format(
        root=str(Path(__file__).parents[2]),
        method=method,
        after=after,
        outputs=str(outputs),
        config=str(plan.path),
        recipe=recipe,
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    register(renamed, outputs)
    told = registration(outputs, recipe)
    assert told["version"] == "1" and told["aliases"] == ["challenger", "champion"]
    store = client(outputs)
    assert len(store.search_model_versions(f"name = '{recipe}'")) == 1
    version = registry.resolve_version(store, f"models:/{recipe}@champion")
    verify_package(registry.version_files(outputs, version, registry.PACKAGE))
    trail = [(move.alias, move.after) for move in audit.moves(outputs, recipe) if move.state == "done"]
    assert trail == [("challenger", "1"), ("champion", "1")]
    experiment = store.get_experiment_by_name(recipe).experiment_id
    assert len(store.search_logged_models([experiment])) == 1


def test_mlflow_itself_loads_the_version_and_enforces_its_signature(plan, outputs, monkeypatch):
    import mlflow

    make(named(plan, "pyfunc"), outputs, "w1", outcomes(118))
    register(named(plan, "pyfunc"), outputs)
    fake = types.ModuleType("prts_core.policy.policy")
    fake.load_policy = load_toy_policy
    monkeypatch.setitem(sys.modules, "prts_core.policy.policy", fake)
    before = mlflow.get_tracking_uri()
    try:
        mlflow.set_tracking_uri(tracking_uri(outputs))
        model = mlflow.pyfunc.load_model("models:/pyfunc@champion")
        observation = {
            "observation.state": np.ones((2, 3), np.float32),
            "observation.images.top": np.zeros((2, 8, 8, 3), np.uint8),
            "observation.images.wrist": np.zeros((2, 8, 8, 3), np.uint8),
            "prompt": np.array(["open the door", "close"]),
        }
        actions = model.predict(observation, params={"seed": 5})
        assert actions.shape == (2, 4, 2) and actions.dtype == np.float32
        policy = load_toy_policy(registry.version_files(outputs, _champion(outputs, "pyfunc"), registry.PACKAGE))
        prompts = observation.pop("prompt").tolist()
        np.testing.assert_array_equal(actions, policy.act(observation, prompts, [5, 6]))
        observation["prompt"] = np.array(prompts)
        with pytest.raises(mlflow.exceptions.MlflowException, match=r"observation\.state"):
            model.predict(observation | {"observation.state": np.ones((2, 4), np.float32)})
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow writes it when it is told a store


def _champion(outputs: Path, name: str):
    return registry.resolve_version(client(outputs), f"models:/{name}@champion")


def test_wrong_references_and_names_are_told(plan, outputs):
    store = client(outputs)
    with pytest.raises(StageError, match="No registered model 'firts'"):
        registry.resolve_version(store, "models:/firts@champion")
    with pytest.raises(StageError, match="no model reference"):
        registry.resolve_version(store, "models:/first")
    make(named(plan, "numbers"), outputs, "w1", outcomes(118))
    register(named(plan, "numbers"), outputs)
    with pytest.raises(StageError, match="no version 99"):
        registry.resolve_version(store, "models:/numbers/99")
    with pytest.raises(ValueError, match="is no name"):
        named(plan, "slash", model_name="a/b")


def test_a_registered_package_is_signed_whether_or_not_it_stands_already(plan, outputs, tmp_path):
    plan = named(plan, "signed")
    made = make(plan, outputs, "w1", outcomes(118))
    register(plan, outputs)
    new_key(tmp_path / "keys" / "me.pem")
    with pytest.raises(CheckpointError, match=r"not signed.*signature\.json"):
        resolve("models:/signed@champion", outputs, tmp_path / "keys")
    assert register(plan, outputs, key=tmp_path / "keys" / "me.pem")["version"] == "1"
    found = resolve("models:/signed@champion", outputs, tmp_path / "keys")
    assert found.content_digest == made["package"].content_digest, "a signature is no part of what is signed"
    assert not (made["package"].folder(outputs) / "signature.json").exists(), "results stay as they are"


def test_a_version_that_has_its_contents_digest_as_package_digest_is_still_known(plan, outputs):
    plan = named(plan, "before")
    content = make(plan, outputs, "w1", outcomes(118))["package"].content_digest
    store, digest = client(outputs), register(plan, outputs)["package_digest"]
    store.delete_model_version_tag("before", "1", "prts.content_digest")
    store.set_model_version_tag("before", "1", "prts.package_digest", content)
    found = resolve("models:/before/1", outputs)
    assert (found.package_digest, found.content_digest) == (digest, content)
    told = register(plan, outputs)
    assert (told["version"], told["package_digest"], told["content_digest"]) == ("1", digest, content)


def test_a_policy_that_is_slower_here_than_its_budget_is_not_promoted(plan, outputs):
    plan = named(plan, "slow")
    make(plan, outputs, "w1", outcomes(118), chunk_ms=100.01)
    told = register(plan, outputs)
    assert not told["verdict"]["promote"] and told["verdict"]["objections"] == [["latency", platform.node()]]
    assert "longer for a chunk than its package's budget" in told["verdict"]["reason"]
    version = client(outputs).get_model_version("slow", "1")
    (tag,) = (name for name in version.tags if name.startswith(latency.TAG))
    assert json.loads(version.tags[tag])["p95_ms"] == 100.01


def test_a_policy_that_nobody_has_timed_here_is_timed_at_its_promotion(plan, outputs, tmp_path, monkeypatch):
    plan = named(plan, "timed")
    made = make(plan, outputs, "w1", outcomes(118))
    monkeypatch.setattr(platform, "node", lambda: "another machine")
    policy = load_policy(write_policy(tmp_path / "policy", MODEL))
    monkeypatch.setattr("prts_core.policy.policy.load_policy", lambda folder: policy)
    assert register(plan, outputs)["verdict"]["promote"]
    version = client(outputs).get_model_version("timed", "1")
    found = [json.loads(text) for name, text in version.tags.items() if name.startswith(latency.TAG)]
    (here,) = (one for one in found if one["machine"] == "another machine")
    assert len(found) == 2 and 0 < here["p50_ms"] <= here["p95_ms"] <= here["p99_ms"] and here["repeats"] >= 10
    assert latency.too_slow(outputs, version) == "", "asked again, it is not measured again"
    assert made["package"].content_digest == version.tags["prts.content_digest"]


def test_a_policy_that_was_timed_on_another_device_of_this_machine_is_timed_again(plan, outputs, tmp_path, monkeypatch):
    plan = named(plan, "devices")
    monkeypatch.setattr("tests.fixtures.toy_package.hardware", lambda: "another device")
    make(plan, outputs, "w1", outcomes(118), chunk_ms=100.02)
    policy = load_policy(write_policy(tmp_path / "policy", MODEL))
    monkeypatch.setattr("prts_core.policy.policy.load_policy", lambda folder: policy)
    assert register(plan, outputs)["verdict"]["promote"], "too slow there says nothing of here"
    version = client(outputs).get_model_version("devices", "1")
    found = [json.loads(text) for name, text in version.tags.items() if name.startswith(latency.TAG)]
    assert {one["device"].rpartition(", ")[0] for one in found} == {"another device", latency.hardware()}
    assert {one["machine"] for one in found} == {platform.node()}


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda f: (f / "model.safetensors").write_text("w2"), r"changed.*model\.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), r"missing.*model\.safetensors"),
        (lambda f: (f / "evil.py").write_text(""), r"does not have.*evil\.py"),
        (lambda f: (f / "rskill.yaml").unlink(), "no PRTS package"),
        (lambda f: (f / "digests.json").unlink(), "no list of its files' digests"),
        (lambda f: _relist(f, {"../x": "sha256:0"}), "outside the package"),
        (lambda f: _relist(f, {"/etc/passwd": "sha256:0"}), "outside the package"),
        (lambda f: (f / "rskill.yaml").write_text("files: 3"), r"changed.*rskill\.yaml"),
    ],
)
def test_a_damaged_package_is_refused_by_name(tmp_path, damage, told):
    write_package(tmp_path / "p", "w1")
    verify_package(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(CheckpointError, match=told):
        verify_package(tmp_path / "p")


def _relist(folder: Path, files: dict[str, str]) -> None:
    write_json(folder / "digests.json", {"files": files})


def older_package(folder: Path) -> Path:
    """A package as registries hold them from before rskill.yaml."""
    write_package(folder, "w1")
    (folder / "rskill.yaml").unlink()
    (folder / "digests.json").unlink()
    files = {path.name: digest_file(path) for path in folder.iterdir()}
    said = {"name": "toy", "kind": "vla", "latency_budget": {"per_chunk_ms": 100.0, "hardware": None}, "files": files}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(said))
    return folder


def test_a_package_of_the_older_form_is_still_verified(tmp_path: Path):
    folder = older_package(tmp_path / "p")
    assert resolve(str(folder)).budget_ms == 100.0
    with pytest.raises(CheckpointError, match="cannot be signed"):
        verify_package(folder, trusted=tmp_path)
    (folder / "model.safetensors").write_text("w2")
    with pytest.raises(CheckpointError, match="changed"):
        verify_package(folder)
    (folder / "manifest.yaml").write_text("files: 3")
    with pytest.raises(CheckpointError, match="manifest is malformed"):
        verify_package(folder)
