"""Whole runs in the toy simulator: equal numbers on both sides, one curve despite kills, faults told, and learning."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prts_core.config.model import TokensConfig
from prts_core.config.rl import AlgorithmConfig, ExplorationConfig, LearnerConfig, RewardConfig, RlConfig
from prts_core.config.rl_placement import NodeGroup, PlacementConfig
from prts_core.io.errors import ConfigError, DataError, StageError, Stopped
from prts_core.policy.policy import load_policy
from prts_core.rl.actor import action_mask
from prts_core.rl.assemble import DecisionTable
from prts_core.rl.collect import Collector
from prts_core.rl.episodes import orders
from prts_core.rl.evaluate import digest_weights
from prts_core.rl.imitation import imitated
from prts_core.rl.run import Run
from prts_core.rl.self_imitation import SolvedEpisodes
from prts_core.rl.state import Progress
from prts_core.sim.suites import suite
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy

TOY = suite("tests.fixtures.toy_family:toy")
DRAWN = {"tasks": ("drawn",), "workers": 4, "stages": 2, "eval_episodes": 4, "eval_every": 0}
FAR = {"shift": -3.0}  # or whatever pushes at all is there at once
FLOW = replace(MODEL, expert=replace(MODEL.expert, noise_scale=0.0), image_size=16)
TOKENS = replace(FLOW, expert=TokensConfig(bins=16))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("policies")
    return {
        name: write_policy(folder / name / "policy", model, TOY) for name, model in (("flow", FLOW), ("tokens", TOKENS))
    }


def config(**changes: Any) -> RlConfig:
    base = RlConfig(
        dataset="toy",
        iterations=3,
        episodes=8,
        learner=LearnerConfig(batch_size=16, micro_batch=8, learning_rate=1e-4, threads=1),
        exploration=ExplorationConfig(level=0.7),
        perturbation=FAR,
        **DRAWN,
    )
    return replace(base, **changes)


def make(folder: Path, work: Path, settings: RlConfig, log: Any = None) -> Run:
    torch.manual_seed(0)
    return Run(load_policy(folder, "fp32", "cpu"), TOY, {}, settings, 7, work, log=log or (lambda metrics, step: None))


def curve(work: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (work / "curve.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def collected(run: Run, iteration: int = 0) -> Any:
    with Collector(run.plan, run.adapter, run.launch, run.config.workers, run.config.stages) as collector:
        return collector.collect(run.actor, orders(run.config, run.plan, run.seed, iteration), iteration)


@pytest.mark.parametrize("kind", ["flow", "tokens"])
def test_the_learner_computes_what_the_rollout_computed(kind: str, folders: dict[str, Path], tmp_path: Path):
    run = make(folders[kind], tmp_path, config())
    policy, actor = run.policy, run.actor
    rng = np.random.default_rng(0)
    seen = {
        "observation.state": rng.normal(0, 0.3, (5, 2)).astype(np.float32),
        "observation.images.eye": rng.integers(0, 255, (5, 8, 8, 3), np.uint8),
    }
    decided = actor.decide(seen, ["push it"] * 5, range(5), np.zeros(5, np.float32))
    from prts_core.policy.observation import read_observation

    prefix = policy.encode(read_observation(seen, ["push it"] * 5, policy.contract.contract)).prefix()
    again, _ = actor.kind.evaluate(
        policy.model, prefix, decided.record, action_mask(policy, 5), run.config.exploration, run.learner.net
    )
    assert torch.equal(again.detach(), decided.log_probs)  # bit for bit
    assert again.requires_grad


@pytest.mark.parametrize("kind", ["flow", "tokens"])
def test_the_first_update_starts_at_the_policy_that_acted(kind: str, folders: dict[str, Path], tmp_path: Path):
    run = make(folders[kind], tmp_path, config(learner=LearnerConfig(batch_size=1000, micro_batch=7, threads=1)))
    records = collected(run).records
    records[0].successes[-1, -1] = True  # or nothing tells good from bad, and nothing is learned
    told = run.learner.update(records, 0, Progress())
    assert told["train/actor/ratio"] == pytest.approx(1, abs=1e-5)
    assert abs(told["train/actor/kl"]) < 1e-6
    assert told["train/actor/clip_fraction"] == 0


STOPPED: dict[str, dict[str, Any]] = {
    "ppo": {"replay": 1, "self_imitation": 0.5},
    "grpo": {"group_size": 4},
    "decoupled_ppo": {"max_staleness": 1},
    "recap": {},
    "dagger": {"replay": 2},
}


def test_a_policy_that_says_its_subtask_learns_with_what_it_said(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config(learner=LearnerConfig(batch_size=1000, micro_batch=7, threads=1)))
    run.policy.processor = run.learner.terms.processor = replace(run.policy.processor, subtasks=True)
    records = collected(run).records
    assert all(len(record.words or []) == len(record) for record in records)
    records[0].successes[-1, -1] = True
    told = run.learner.update(records, 0, Progress())
    assert told["train/actor/ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("algorithm", STOPPED)
def test_a_stopped_run_goes_on_with_the_same_curve(algorithm: str, folders: dict[str, Path], tmp_path: Path):
    learner = replace(config().learner, critic_epochs=2)
    settings = config(algorithm=AlgorithmConfig(name=algorithm, **STOPPED[algorithm]), learner=learner)
    whole = make(folders["flow"], tmp_path / "whole", settings).run()
    stopped = make(folders["flow"], tmp_path / "cut", settings)
    with pytest.raises(Stopped, match="after iteration 1"):
        stopped.run(lambda: stopped.progress.iteration == 2)
    (tmp_path / "cut" / "curve.jsonl").open("a").write('{"iteration": 1, "torn')
    resumed = make(folders["flow"], tmp_path / "cut", settings).run()
    assert resumed.evaluations == whole.evaluations
    first, second = (
        {k: v for k, v in r.items() if not k.startswith("time/")} for r in (whole.rows[-1], resumed.rows[-1])
    )
    assert first == second
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)


@pytest.mark.parametrize(("algorithm", "at"), [("ppo", 1), ("decoupled_ppo", 1), ("recap", 0)])
def test_a_run_stopped_in_the_middle_of_its_episodes_begins_them_again(
    algorithm: str, at: int, folders: dict[str, Path], tmp_path: Path
):
    """Also where the last checkpoint lies an iteration back: what has been learned since is kept."""
    often = int(algorithm == "decoupled_ppo")  # its episodes are under way while it is evaluated, which waits for them
    settings = config(
        algorithm=AlgorithmConfig(name=algorithm, **STOPPED[algorithm]), checkpoint_every=9, eval_every=often
    )
    whole = make(folders["flow"], tmp_path / "whole", settings).run()
    run = make(folders["flow"], tmp_path / "cut", settings)
    seen: list[int] = []

    def stop() -> bool:
        seen.append(run.progress.iteration)
        return seen.count(at) > 3  # in the midst of it

    with pytest.raises(Stopped, match=f"iteration {at}"):
        run.run(stop)
    resumed = make(folders["flow"], tmp_path / "cut", settings)
    done = resumed.run()
    assert len(curve(tmp_path / "cut")) == 3  # what was finished was not run again
    assert done.evaluations == whole.evaluations
    assert all(torch.equal(whole.weights[name], done.weights[name]) for name in whole.weights)


def test_a_lost_simulator_changes_no_bit(folders: dict[str, Path], tmp_path: Path):
    def run(work: str, perturbation: dict[str, Any]) -> Any:
        return collected(make(folders["flow"], tmp_path / work, config(perturbation=FAR | perturbation)))

    calm = run("calm", {})
    killed = run("killed", {"do": "kill", "once": str(tmp_path / "once")})
    assert killed.lost == 1 and calm.lost == 0
    for one, other in zip(calm.records, killed.records, strict=True):
        assert np.array_equal(one.actions, other.actions) and torch.equal(one.log_probs, other.log_probs)
        assert one.order == other.order and one.solved == other.solved


def test_replayed_decisions_are_among_those_learned_from_and_a_pass_is_no_longer(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make(folders["flow"], tmp_path, config(algorithm=AlgorithmConfig(name="dagger", replay=1)))
    met: list[list[tuple[int, int]]] = []
    plain = run.learner.terms.imitation

    def watched(table: Any, chosen: Any, *more: Any) -> Any:
        met[-1] += [(table.records[table.at[i].episode].version, i) for i in chosen.tolist()]
        return plain(table, chosen, *more)

    monkeypatch.setattr(run.learner.terms, "imitation", watched)
    counts = []
    with Collector(run.plan, run.adapter, run.launch, run.config.workers, run.config.stages) as collector:
        for iteration in range(3):
            asked = orders(run.config, run.plan, run.seed, iteration, True)
            made = collector.collect(run.actor, asked, iteration).records
            met.append([])
            run.learner.update(made, iteration, Progress(), run.replay.before(iteration))
            run.replay.add(iteration, made)
            run.replay.forget(iteration)
            counts.append(sum(map(len, made)))
    assert [len(one) for one in met] == counts  # each decision at most once a pass, as many as there are new ones
    assert all(len(set(one)) == len(one) for one in met)
    assert [{version for version, _ in one} for one in met] == [{0}, {0, 1}, {1, 2}]
    assert len(list((tmp_path / "replay").iterdir())) == 2  # one back, and one more for a checkpoint that lies behind


def test_a_refit_teaches_the_critic_and_nothing_else(folders: dict[str, Path], tmp_path: Path):
    def learned(epochs: int) -> dict[str, float]:
        learner = replace(config().learner, critic_epochs=epochs)
        run = make(
            folders["flow"], tmp_path / str(epochs), config(algorithm=AlgorithmConfig(critic_warmup=1), learner=learner)
        )
        before = run.learner.weights()
        records = collected(run).records
        for record in records:  # success, where the critic can see it
            record.features[:] = record.features + 10.0 * (record.order.index % 2)
            record.successes[-1] = record.valid[-1] & bool(record.order.index % 2)
        run.learner.update(records, 0, Progress())
        assert all(torch.equal(before[name], value) for name, value in run.learner.weights().items())
        return run.learner.update(records, 0, Progress())

    told = {epochs: learned(epochs)["train/critic/value_loss"] for epochs in (0, 20)}
    assert told[20] < 0.8 * told[0], told


def test_simulators_are_reset_while_the_learner_learns(folders: dict[str, Path], tmp_path: Path):
    """What was prepared is what is run; an evaluation or other episodes in between give it up and change nothing."""
    run = make(folders["flow"], tmp_path, config())

    def of(iteration: int) -> Any:
        return orders(run.config, run.plan, run.seed, iteration)

    with Collector(run.plan, run.adapter, run.launch, run.config.workers, run.config.stages) as collector:
        plain = collector.collect(run.actor, of(1), 1).records
        collector.prepare(of(1))
        assert collector.prepared is not None
        assert all(stage.beginning for stage in collector.prepared.pipeline.stages)  # under way, and nobody waits
        prepared = collector.collect(run.actor, of(1), 1).records
        collector.prepare(of(2))
        other = collector.collect(run.actor, of(1), 1).records
        collector.prepare(of(2))
        collector.settle()
        again = collector.collect(run.actor, of(1), 1).records
    for made in (prepared, other, again):
        assert all(np.array_equal(a.actions, b.actions) for a, b in zip(plain, made, strict=True))


def test_groups_share_their_initial_state_and_not_their_noise(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config(algorithm=AlgorithmConfig(name="grpo", group_size=4)))
    records = collected(run).records
    for group in (0, 1):
        own = [record for record in records if record.order.group == group]
        first = {record.seen["observation.state"][0].tobytes() for record in own}
        assert len(own) == 4 and len(first) == 1
        assert len({record.actions[0].tobytes() for record in own}) == 4


def test_a_critic_that_errs_is_no_information_where_nothing_was_earned(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config())
    records = collected(run).records
    for record in records:
        record.successes[:] = False
    assert run.learner.critic is not None
    torch.nn.init.normal_(run.learner.critic.out.weight, std=1e-3)
    before = run.learner.weights()
    assert run.learner.update(records, 0, Progress())["train/actor/no_information"] == 1
    assert all(torch.equal(before[name], value) for name, value in run.learner.weights().items())


def test_the_rate_is_steered_by_how_far_the_last_update_moved(folders: dict[str, Path], tmp_path: Path):
    """One update an iteration: before it nothing has moved, and after it something has."""
    learner = LearnerConfig(batch_size=1000, micro_batch=1000, learning_rate=1e-3, target_kl=1e-6, threads=1)
    run, progress = make(folders["flow"], tmp_path, config(learner=learner)), Progress()
    records = collected(run).records
    records[0].successes[-1, -1] = True
    told = run.learner.update(records, 0, progress)
    assert told["train/actor/kl"] == pytest.approx(0, abs=1e-6) and told["train/actor/kl_moved"] > 1e-6
    assert progress.rate < 1


def test_solved_episodes_are_imitated_by_how_little_the_critic_expected_them(folders: dict[str, Path], tmp_path: Path):
    settings = config(algorithm=AlgorithmConfig(self_imitation=1.0, gamma=0.5), learner=LearnerConfig(threads=1))
    run = make(folders["flow"], tmp_path, settings)
    records = collected(run).records
    for at, record in enumerate(records):
        record.successes[:], record.solved = False, at == 1
    records[1].successes[-1, -1] = True
    count, generator = len(records[1]), torch.Generator().manual_seed(0)
    again = SolvedEpisodes(records, run.learner.terms, settings, lambda features: torch.full((len(features), 1), 0.3))
    wanted = [max(0.0, 0.5 ** (count - 1 - row) - 0.3) for row in range(count)]
    assert again.weights.tolist() == pytest.approx(wanted)
    told = [again.backward(generator, update) for update in range(2)]
    assert all(one["actor/self_imitation_loss"] > 0 for one in told)
    assert any(p.grad is not None and bool(p.grad.any()) for p in run.learner.trained.values())
    nothing = SolvedEpisodes([records[0]], run.learner.terms, settings, None)
    assert nothing.backward(generator, 0) == {}


def test_an_iteration_that_imitates_comes_closer_to_what_solved_the_task(folders: dict[str, Path], tmp_path: Path):
    algorithm = AlgorithmConfig(name="grpo", group_size=4, self_imitation=1.0)
    settings = config(algorithm=algorithm, learner=LearnerConfig(learning_rate=1e-3, batch_size=4, threads=1))
    run = make(folders["flow"], tmp_path, settings)
    records = collected(run).records
    for record in records:
        record.successes[:], record.solved = False, False
    records[1].successes[-1, -1], records[1].solved = True, True
    losses = []
    for iteration in range(6):
        told = run.learner.update(records, iteration, Progress())
        losses.append(told["train/actor/self_imitation_loss"])
    assert losses[-1] < losses[0]


def test_updates_are_of_about_equal_size(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One decision more than fits is no update of its own."""
    run = make(folders["flow"], tmp_path, config())
    records = collected(run).records
    records[0].successes[-1, -1] = True
    decisions, sizes = sum(map(len, records)), []
    run.learner.config = replace(run.config, learner=replace(run.config.learner, batch_size=decisions - 1))
    plain = run.learner._step

    def watched(table: Any, pieces: Any, *more: Any) -> Any:
        sizes.append(sum(len(chosen) for chosen, _ in pieces))
        return plain(table, pieces, *more)

    monkeypatch.setattr(run.learner, "_step", watched)
    run.learner.update(records, 0, Progress())
    assert len(sizes) == 2 and max(sizes) - min(sizes) <= 1 and sum(sizes) <= decisions


def test_the_potential_is_of_the_state_and_not_of_the_action_that_was_drawn(folders: dict[str, Path], tmp_path: Path):
    run = make(
        folders["flow"], tmp_path, config(reward=RewardConfig(shaping=0.1), exploration=ExplorationConfig(level=1))
    )
    seen = {
        "observation.state": np.zeros((2, 2), np.float32),
        "observation.images.eye": np.zeros((2, 8, 8, 3), np.uint8),
    }
    decided = run.actor.decide(seen, ["push it"] * 2, [1, 2], np.zeros(2, np.float32))
    assert decided.potentials is not None and not np.array_equal(decided.actions[0], decided.actions[1])
    assert decided.potentials[0] == pytest.approx(decided.potentials[1], abs=1e-5)


def test_an_expert_that_acts_is_no_success_of_the_policy(folders: dict[str, Path], tmp_path: Path):
    settings = config(algorithm=AlgorithmConfig(name="dagger", expert_share=1.0, expert_decay=0.0))
    run = make(folders["flow"], tmp_path, settings)
    with Collector(run.plan, run.adapter, run.launch, run.config.workers, run.config.stages) as collector:
        records = [collector.collect(run.actor, orders(run.config, run.plan, 7, i, True), i).records for i in (0, 1)]
    told = [run.learner.update(made, i, Progress()) for i, made in enumerate(records)]
    assert told[0]["env/expert_episodes"] == 1 and "env/success_once" not in told[0]
    assert told[1]["env/expert_episodes"] == 0 and "env/success_once" in told[1]


def test_nothing_is_imitated_after_the_task_is_solved(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config(algorithm=AlgorithmConfig(name="recap")))
    record = collected(run).records[0]
    record.successes[0] = [False, True, False, False][: record.successes.shape[1]]
    record.valid[0] = True
    table = DecisionTable([record], torch.ones(len(record), 1, dtype=torch.bool))
    _, silent = imitated(table, torch.tensor([0]), run.policy)
    assert silent[0].tolist()[:3] == [False, False, True]


@pytest.mark.parametrize("kind", ["flow", "tokens"])
def test_the_size_of_micro_batches_changes_nothing_that_is_drawn(kind: str, folders: dict[str, Path], tmp_path: Path):
    def learned(size: int) -> dict[str, torch.Tensor]:
        learner = LearnerConfig(batch_size=64, micro_batch=size, learning_rate=1e-4, threads=1)
        run = make(
            folders[kind], tmp_path / str(size), config(algorithm=AlgorithmConfig(name="dagger"), learner=learner)
        )
        with Collector(run.plan, run.adapter, run.launch, run.config.workers, run.config.stages) as collector:
            records = collector.collect(run.actor, orders(run.config, run.plan, 7, 0, True), 0).records
        run.learner.update(records, 0, Progress())
        return run.learner.weights()

    one, other = learned(64), learned(5)
    assert all(torch.allclose(one[name], other[name], atol=2e-6) for name in one)


def test_a_run_that_is_checkpointed_seldom_finds_the_episodes_it_replays(folders: dict[str, Path], tmp_path: Path):
    settings = config(iterations=7, checkpoint_every=3, algorithm=AlgorithmConfig(name="dagger", replay=2))
    whole = make(folders["flow"], tmp_path / "whole", settings).run()
    run = make(folders["flow"], tmp_path / "cut", settings)
    plain, done = run._iterate, []

    def dies(side: Any, iteration: int) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(iteration)
        plain(side, iteration)

    run._iterate = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    resumed = make(folders["flow"], tmp_path / "cut", settings).run()
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    kept = sorted(int(path.stem) for path in (tmp_path / "cut" / "replay").iterdir())
    assert kept == [4, 5, 6]  # of checkpoints 6 and 7, two iterations before the elder on


def test_outcomes_belong_to_the_weights_that_acted(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config())
    first = digest_weights(run.policy.model)
    assert first == digest_weights(make(folders["flow"], tmp_path, config()).policy.model)
    with torch.no_grad():
        next(iter(run.policy.model.dit_action_head.parameters())).add_(1e-3)
    assert digest_weights(run.policy.model) != first


def test_what_cannot_work_is_refused_before_it_begins(folders: dict[str, Path], tmp_path: Path):
    cluster = {"all": NodeGroup(nodes=4, accelerators=0)}
    several = PlacementConfig(components={"env,rollout": "0-1", "actor": "2-3"}, cluster=cluster)
    with pytest.raises(ConfigError, match="learner is one process"):
        make(folders["flow"], tmp_path, config(placement=several))
    apart = replace(several, components={"env,rollout": "0-1", "actor": "2"})
    with pytest.raises(ConfigError, match="do not ask for good decisions"):
        make(folders["flow"], tmp_path, config(placement=apart, algorithm=AlgorithmConfig(name="recap")))
    with pytest.raises(ValueError, match="grpo compares episodes"):
        config(algorithm=AlgorithmConfig(name="grpo"))
    with pytest.raises(ValueError, match="grpo has no critic"):
        config(algorithm=AlgorithmConfig(name="grpo", group_size=4, critic_warmup=1))
    with pytest.raises(ConfigError, match="density of a part"):
        make(folders["flow"], tmp_path, config(execute_steps=2))
    make(folders["flow"], tmp_path, config(execute_steps=2, exploration=ExplorationConfig(step=-1)))
    make(folders["tokens"], tmp_path, config(execute_steps=2))


def test_the_rate_rises_from_the_first_update_of_the_policy_on(folders: dict[str, Path], tmp_path: Path):
    learner = replace(config().learner, warmup=100)
    run, progress = (
        make(folders["flow"], tmp_path, config(algorithm=AlgorithmConfig(critic_warmup=1), learner=learner)),
        Progress(),
    )
    records = collected(run).records
    records[0].successes[-1, -1] = True
    run.learner.update(records, 0, progress)
    assert progress.updates == 0
    run.learner.update(records, 1, progress)
    assert progress.updates > 0


def test_groups_that_are_all_alike_teach_nothing_and_it_is_told(folders: dict[str, Path], tmp_path: Path):
    settings = config(algorithm=AlgorithmConfig(name="grpo", group_size=4))
    run = make(folders["flow"], tmp_path, settings)
    records = collected(run).records
    for record in records:
        record.successes[:] = False
        record.solved = False
    before = run.learner.weights()
    told = run.learner.update(records, 0, Progress())
    assert told["train/actor/no_information"] == 1
    assert all(torch.equal(before[name], value) for name, value in run.learner.weights().items())


@pytest.mark.parametrize("small_disk", ["2m"], indirect=True)
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, folders: dict[str, Path], tmp_path: Path
):
    whole = make(folders["flow"], tmp_path / "whole", config()).run()
    (small_disk / "others").write_bytes(b"x" * 1_500_000)
    with pytest.raises(StageError, match=r"disk is full.*MiB free.*Cure: free some space"):
        make(folders["flow"], small_disk / "run", config()).run()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = make(folders["flow"], small_disk / "run", config()).run()
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    assert not list(small_disk.rglob("*.partial-*"))


def test_a_policy_that_answers_with_nan_is_named(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config())
    with torch.no_grad():
        next(iter(run.policy.model.dit_action_head.parameters())).fill_(float("nan"))
    with pytest.raises(DataError, match="no number"):
        collected(run)


def test_updates_that_are_no_numbers_are_left_out_counted_and_then_an_error(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make(folders["flow"], tmp_path, config(learner=LearnerConfig(batch_size=1000, micro_batch=1000, threads=1)))
    records = collected(run).records
    for record in records:
        record.log_probs[:] = float("nan")
    before, progress = run.learner.weights(), Progress()
    assert run.learner.update(records, 0, progress)["train/actor/skipped"] == 1
    assert progress.updates == 0
    assert all(torch.equal(before[name], value) for name, value in run.learner.weights().items())
    run.learner.update(records, 1, progress)
    with pytest.raises(StageError, match="no numbers"):
        run.learner.update(records, 2, progress)


def test_states_that_are_trained_on_are_not_evaluated(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="drawn, initial state 0, seed 7"):
        make(folders["flow"], tmp_path, config(train_seed=5))
    stored = config(tasks=("push",), eval_episodes=1)
    with pytest.raises(ConfigError, match="which initial states"):
        make(folders["flow"], tmp_path, stored)
    run = make(folders["flow"], tmp_path, replace(stored, train_states=(0, 2)))
    assert {key.initial_state for key in run.held_out.keys} == {2}
    met = {o.key.initial_state for i in range(9) for o in orders(run.config, run.plan, 7, i)}
    assert met == {0, 1}


def test_shaping_is_told_beside_what_was_earned(folders: dict[str, Path], tmp_path: Path):
    run = make(folders["flow"], tmp_path, config(reward=RewardConfig(shaping=0.1)))
    records = collected(run).records
    assert all(record.potentials is not None for record in records)
    told = run.learner.update(records, 0, Progress())
    assert np.isfinite(told["rollout/rewards"]) and "env/return" in told


def test_rollouts_ahead_are_one_version_behind_and_told(folders: dict[str, Path], tmp_path: Path):
    settings = config(algorithm=AlgorithmConfig(name="decoupled_ppo", max_staleness=1))
    rows = make(folders["flow"], tmp_path, settings).run().rows
    assert [row["rollout/data_staleness_1/ratio"] for row in rows] == [0, 1, 1]
    assert all(abs(row["train/actor/proximal_ratio"] - 1) < 0.5 for row in rows)


LEARNS = {
    "ppo": AlgorithmConfig(name="ppo", critic_warmup=1),
    "grpo": AlgorithmConfig(name="grpo", group_size=8),
    "dagger": AlgorithmConfig(name="dagger", expert_decay=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kind"), [("ppo", "flow"), ("grpo", "tokens"), ("dagger", "flow")])
def test_it_learns_to_push(algorithm: str, kind: str, folders: dict[str, Path], tmp_path: Path):
    """From a policy that stands still (flow) or pushes aside (tokens), and now and then explores its way there."""
    settings = config(
        algorithm=LEARNS[algorithm],
        iterations=12,
        episodes=48,
        eval_episodes=20,
        perturbation={"shift": 0.0},
        exploration=ExplorationConfig(level=1.0, step=-1, correlation=0.5),
        learner=LearnerConfig(
            batch_size=64, micro_batch=64, learning_rate=1e-3, value_lr=3e-3, epochs=2, threads=1, warmup=5
        ),
    )
    run = make(folders[kind], tmp_path, settings)
    if kind == "flow":
        with torch.no_grad():
            for parameter in run.policy.model.dit_action_head.action_out_proj.parameters():
                parameter.zero_()
    found = run.run()
    rates = [row.get("env/success_once", np.nan) for row in found.rows]  # none where the expert acted in all of them
    if kind == "tokens":  # its likeliest tokens get there from the first, what it draws does not
        assert np.mean(rates[-3:]) >= np.mean(rates[:3]) + 0.15, rates
    else:
        assert found.evaluations[-1].successes >= found.evaluations[0].successes + 8, rates
