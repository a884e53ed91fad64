"""What docs/how-to says of reinforcement learning is so: links, settings, metrics, and an algorithm that is tried."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from torch import Tensor

from prts_core.config.load import load_plan
from prts_core.config.rl import AlgorithmConfig, LearnerConfig, RlSection
from prts_core.rl import algorithms
from prts_core.rl.algorithms import Evaluated, Samples, weighing
from prts_core.rl.means import Totals
from prts_core.rl.metrics import pool
from prts_core.rl.rollouts import Rollouts, end_at
from tests.test_structure import ROOT

HOW_TO = ROOT / "docs" / "how-to"
GUIDE, ADD = HOW_TO / "reinforcement-learning.md", HOW_TO / "add-an-rl-algorithm.md"
METRIC = re.compile(r"(?:train/)?((?:actor|critic|rollout|env|eval|time)/[\w/<>]*)")
ADDED_UP = "critic/sum_"  # of what explained_variance is made, never logged
ENDINGS = ("_mean", "_max", "_min")


def block(path: Path, language: str) -> str:
    """The page's first block of that language."""
    found = re.search(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


# ---- links, settings, metrics --------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", sorted(HOW_TO.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`(prts_core/[\w/]+(?:\.py)?|tests/[\w/]+\.py)`", page.read_text()):
        assert (ROOT / named).exists() or named.endswith("reinforce.py"), named


def settings(kind: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield f"{prefix}.{field.name}"
        if is_dataclass(hints[field.name]):
            yield from settings(hints[field.name], f"{prefix}.{field.name}")


@pytest.mark.parametrize("page", [GUIDE, ADD], ids=lambda path: path.name)
def test_settings_that_are_named_exist(page: Path):
    known = set(settings(RlSection, "rl"))
    named = set(re.findall(r"(?<![./\w])rl(?:\.[a-z_]+)+", page.read_text()))
    assert named and named <= known, named - known


def test_the_recipe_of_the_page_is_one(tmp_path: Path):
    whole = yaml.safe_load((ROOT / "configs" / "rl_metaworld.yaml").read_text()) | yaml.safe_load(block(GUIDE, "yaml"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
    for folder in ("datasets", "models", "robots", "mappings"):
        (tmp_path / folder).symlink_to(ROOT / "configs" / folder)
    plan = load_plan(tmp_path / "recipe.yaml")
    assert plan.recipe.policy == "rl" and plan.rl.algorithm.name == "ppo" and plan.rl.learner.target_kl == 0.02


def test_every_algorithm_is_named():
    row = next(line for line in GUIDE.read_text().splitlines() if line.startswith("| `rl.algorithm.name`"))
    assert set(algorithms.names()) <= set(re.findall(r"`(\w+)`", row))


def logged() -> set[str]:
    """Names of metrics that stand in the code, those that are put together as far as they do."""
    found = set()
    for path in (ROOT / "prts_core" / "rl").rglob("*.py"):
        if path.name in ("page.py", "report.py"):  # readers
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                found.add(METRIC.fullmatch(node.value)[1])  # type: ignore[index]
    return {name for name in found if not name.startswith(ADDED_UP)}


def test_every_metric_is_explained_and_no_other():
    explained = {
        name
        for line in GUIDE.read_text().splitlines()
        if line.startswith("| `") and "/" in line
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
        if METRIC.fullmatch(name)
    }
    known = logged()
    plain = {name.removesuffix(ending) for name in explained for ending in ("", *ENDINGS)}
    missing = [name for name in known if not any(there.startswith(name) for there in plain)]
    assert not missing, missing
    begun = known - explained  # put together, as rollout/advantages_max is
    made_up = [name for name in explained - known if not name.startswith(("eval/", *begun))]
    assert not made_up, made_up


def test_what_an_evaluation_logs_is_explained():
    from prts_core.rl.evaluate import Evaluation

    text = GUIDE.read_text()
    for name in Evaluation(0, {("reach", 0, 0): True, ("push", 0, 0): False}).metrics():
        assert f"`{re.sub('(reach|push)$', '<task>', name)}`" in text, name


# ---- the algorithm of the page ---------------------------------------------------------------------------------------
@pytest.fixture
def reinforce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's file among the algorithms."""
    (tmp_path / "reinforce.py").write_text(block(ADD, "python"))
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    name = f"{algorithms.__name__}.reinforce"
    yield algorithms.algorithm("reinforce")  # type: ignore[misc]
    sys.modules.pop(name)
    del algorithms.reinforce  # type: ignore[attr-defined]


def rollouts(solved: list[bool], spoil: float = 0.0) -> Rollouts:
    """An episode a column: of two decisions of three steps, solved at the fifth or cut after the sixth."""
    count = len(solved)
    ended = torch.zeros(3, count, 3, dtype=torch.bool)
    ended[1, :, 1] = torch.tensor(solved)
    executed = torch.ones(3, count, 3, dtype=torch.bool)
    executed[2] = False
    dones, mask, terminated = end_at(ended, executed)
    earned = torch.where(mask, ended.float(), spoil)
    return Rollouts(
        earned,
        earned,
        dones,
        terminated,
        mask,
        None,
        torch.where(mask[..., None], -0.5, spoil).expand(-1, -1, -1, 2).contiguous(),
        torch.arange(count),
        torch.zeros(3, count, dtype=torch.int64),
    )


def samples(seen: Rollouts, told: Any) -> tuple[Samples, Tensor]:
    """All decisions of the first two rows, and log-probabilities with a graph."""
    flat = {name: getattr(told, name)[:2].flatten(0, 1) for name in ("advantages", "mask")}
    assert seen.log_probs is not None
    was = Samples(
        log_probs=seen.log_probs[:2].flatten(0, 1),
        returns=None,
        values=None,
        steps_of_episode=told.steps_of_episode[:2].flatten(),
        most_steps=6,
        version=seen.version[:2].flatten(),
        current_version=1,
        executed=seen.mask[:2].flatten(0, 1),
        **flat,
    )
    assert was.log_probs is not None
    return was, was.log_probs.clone().requires_grad_()


def test_what_earned_more_than_the_mean_becomes_likelier(reinforce: ModuleType):
    assert "reinforce" in algorithms.names()
    seen = rollouts([True, False, False])
    told = reinforce.targets(seen, AlgorithmConfig())
    assert told.informative and told.metrics == {"rollout/baseline": pytest.approx(1 / 3)}
    was, log_probs = samples(seen, told)
    reinforce.loss(Evaluated(log_probs), was, AlgorithmConfig())[0].backward()
    assert log_probs.grad is not None
    step, executed = -log_probs.grad, seen.mask[:2].flatten(0, 1)
    for at in range(6):
        won = at % 3 == 0
        assert (step[at][executed[at]] > 0 if won else step[at][executed[at]] < 0).all()
        assert (step[at][~executed[at]] == 0).all()
    weights = [step[at :: len(seen.terminated)].abs().sum() for at in range(3)]
    assert weights[1] == weights[2]


def test_micro_batches_add_up_to_the_update(reinforce: ModuleType):
    seen = rollouts([True, False, True, False, False])
    told = reinforce.targets(seen, AlgorithmConfig())
    was, log_probs = samples(seen, told)
    whole, metrics = reinforce.loss(Evaluated(log_probs), was, AlgorithmConfig())
    whole.backward()
    weight, number = weighing(was)
    pieces, grad = [], log_probs.grad
    again = log_probs.detach().clone().requires_grad_()
    for part in torch.arange(10).split(3):
        own = {f.name: getattr(was, f.name) for f in fields(was)}
        own = {name: x[part] if isinstance(x, Tensor) else x for name, x in own.items()}
        small = replace(Samples(**own), totals=Totals(weight, number))
        value, more = reinforce.loss(Evaluated(again[part]), small, AlgorithmConfig())
        value.backward()
        pieces.append(more)
    assert again.grad is not None and grad is not None
    torch.testing.assert_close(again.grad, grad)
    together = pool(pieces)
    assert together == pytest.approx({name: float(value) for name, value in metrics.items()}, abs=1e-6)


def test_what_was_not_executed_changes_nothing(reinforce: ModuleType):
    found = []
    for spoil in (0.0, float("nan")):
        seen = rollouts([True, False], spoil)
        told = reinforce.targets(seen, AlgorithmConfig())
        was, log_probs = samples(seen, told)
        found.append((told.advantages, reinforce.loss(Evaluated(log_probs), was, AlgorithmConfig())[0].detach()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("solved", [True, False])
def test_episodes_that_are_all_alike_teach_nothing(reinforce: ModuleType, solved: bool):
    assert not reinforce.targets(rollouts([solved] * 3), AlgorithmConfig()).informative


def test_a_run_learns_by_it(reinforce: ModuleType, tmp_path: Path):
    from prts_core.policy.policy import load_policy
    from prts_core.rl.run import Run
    from prts_core.sim.suites import suite
    from tests.fixtures.tiny_network import MODEL
    from tests.fixtures.tiny_policy import write_policy
    from tests.rl.made_up import config

    toy = suite("tests.fixtures.toy_family:toy")
    folder = write_policy(tmp_path / "policy" / "policy", replace(MODEL, image_size=16), toy)
    asked = config(
        algorithm=AlgorithmConfig(name="reinforce"),
        learner=LearnerConfig(batch_size=1000, micro_batch=8, learning_rate=1e-3, threads=1),
        tasks=("drawn",),
        perturbation={"shift": -1.5},  # far enough that some arrive late or never
        iterations=2,
        episodes=8,
        eval_every=0,
        eval_episodes=2,
        workers=2,
        stages=2,
    )
    run = Run(load_policy(folder, "fp32", "cpu"), toy, {}, asked, 7, tmp_path / "work")
    before = run.learner.weights()
    made = run.run()
    assert len(made.rows) == 2 and all("rollout/baseline" in row for row in made.rows)
    learned = [row for row in made.rows if "train/actor/log_prob" in row]
    assert learned and all(torch.isfinite(torch.tensor(row["train/actor/total_loss"])) for row in learned)
    assert any(not torch.equal(before[name], value) for name, value in run.learner.weights().items())
