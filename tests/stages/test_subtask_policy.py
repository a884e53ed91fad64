"""`policy: subtask`: a policy that reasons in subtasks is benchmarked, valued, packaged and served like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from prts_core.config.load import load_plan
from prts_core.delivery.resolve import resolve
from prts_core.io.files import read_json
from prts_core.policy.observation import STATE
from prts_core.policy.policy import load_policy
from prts_core.skills.manifest import read_manifest
from prts_core.stages import chain, declarations
from tests.fixtures.smoke_run import RECIPE


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_subtask_policy_goes_on_to_the_package(smoke_outputs: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(smoke_outputs, outputs)
    plan, store = load_plan(RECIPE, ["policy=subtask", "benchmark.failures_wanted=8"]), chain.store(outputs)
    made = {}
    for stage, partition in declarations.steps(plan):
        known = store.find(store.resolve(stage, plan, partition))
        assert (known is None) == (stage in ("benchmark", "value", "package")), "what came before is the smoke run's"
        made[stage] = store.run(stage, plan, partition)

    taught, package = made["subtask"], made["package"].folder(outputs)
    assert set(made["benchmark"].parents) == {"convert", "sft", "subtask"}
    assert made["package"].parents["subtask"] == taught.key and "sft" not in made["package"].parents
    report = read_json(made["benchmark"].folder(outputs) / "report.json")
    assert report["policy_digest"] == read_json(taught.folder(outputs) / "report.json")["policy_digest"]
    episodes = pl.read_parquet(made["benchmark"].folder(outputs) / "episodes.parquet")
    assert {"policy", "expert", "untrained"} <= set(episodes["condition"])
    assert {"early", "noisy"} <= set(episodes["condition"]), "failures for the value's AUROC"
    resolve(str(package), outputs)
    assert read_manifest(package).policy_extras["capabilities"] == ["act", "value", "subtask"]
    trained = read_json(package / "train_config.json")
    assert trained == read_json(taught.folder(outputs) / "train_config.json")

    policy = load_policy(package)
    contract, rng = policy.contract.contract, np.random.default_rng(0)
    seen = {c.key: rng.integers(0, 256, (1, c.height, c.width, 3), np.uint8) for c in contract.cameras}
    seen[STATE] = policy.processor.statistics.state.mean[None].astype(np.float32)
    answer = policy.answer(seen, ["open the faucet"], [0], value=True)
    assert answer.subtask is not None and answer.values is not None
    assert np.isfinite(answer.actions).all() and np.isfinite(answer.values).all()
