"""Iterate: run episodes, learn from them, look how good the policy has become; resumable after every iteration."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prts_core.config.rl import RlConfig
from prts_core.io.errors import ConfigError, Stopped
from prts_core.io.files import cut_torn_line, explain_os_errors
from prts_core.io.progress import Bar
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import Policy
from prts_core.rl.actor import Actor
from prts_core.rl.algorithms import algorithm, unread
from prts_core.rl.collect import Collected, Collector
from prts_core.rl.episodes import EpisodeOrder, evaluation_plan, orders, training_plan
from prts_core.rl.evaluate import Evaluation, evaluate, finished
from prts_core.rl.imitation import require_same_actions
from prts_core.rl.learner import Learner
from prts_core.rl.policies import policy_kind
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.placement import place
from prts_core.rl.processes.remote_collect import CALL, RolloutProcesses, published, worker_settings
from prts_core.rl.processes.start import start_rollout
from prts_core.rl.replay import Replay
from prts_core.rl.rollout_side import Ahead, Collects, OnPolicy, RolloutSide
from prts_core.rl.state import Checkpoints, Progress, read_rows
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import launch_for
from prts_core.sim.suite import SuiteSpec

logger = logging.getLogger("prts.rl")


@dataclass(frozen=True)
class Folders:
    """work: resume state. curve: one line an iteration."""

    work: Path

    @property
    def curve(self) -> Path:
        return self.work / "curve.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.work / "evaluations"


@dataclass(frozen=True)
class Outcome:
    """weights: of the policy that is the result. evaluations: first to last. chosen: the iteration whose weights they
    are. rows: the curve. noise_scale: of a flow policy; none: it has action tokens."""

    weights: dict[str, Tensor]
    evaluations: list[Evaluation]
    chosen: int
    rows: list[dict[str, float]]
    plan: EpisodePlan
    noise_scale: float | None = None


class Run:
    """One run: the policy learns in place. folder: where it lies, for rollout processes of its own."""

    def __init__(
        self,
        policy: Policy,
        suite: SuiteSpec,
        worker_settings: dict[str, Any],
        config: RlConfig,
        seed: int,
        work: Path,
        folder: Path | None = None,
        log: Callable[[dict[str, float], int], None] = lambda metrics, step: None,
    ) -> None:
        self.policy, self.config, self.seed, self.log, self.folder = policy, config, seed, log, folder
        self.folders = Folders(work)
        self.plan = training_plan(config, suite, policy.contract.chunk_length)
        self.held_out = evaluation_plan(config, self.plan)
        self.adapter = adapt(
            policy.contract.contract, self.plan.suite.contract, policy_name="the policy", suite_name=suite.name
        )
        name = f"{suite.family}:{suite.name}" if "." in suite.family else suite.name
        if "expert" in algorithm(config.algorithm.name).NEEDS:
            require_same_actions(self.adapter)
        policy_kind(policy.model).require_density(policy.model, config.exploration, self.plan.execute)
        self.suite, self.worker_settings = name, worker_settings
        self.placement = place(config.placement, torch.cuda.device_count())
        if (learners := len(self.placement.components["actor"])) > 1:
            raise ConfigError(
                "The learner is one process",
                field="rl.placement.components.actor",
                found=f"{learners} processes",
                expected="one resource, such as actor: 0",
                cure="place env and rollout on the others",
            )
        if config.algorithm.name == "recap" and not self.placement.one_process:
            raise ConfigError(
                "Rollout processes do not ask for good decisions as the learner's policy does",
                field="rl.placement",
                found=self.placement.mode,
                expected="one process, with rl.algorithm.name recap",
                cure="leave rl.placement out, or choose another algorithm",
            )
        self.launch = launch_for(name, settings={**worker_settings, **self.plan.worker_settings})
        self.learner = Learner(policy, config, seed)
        shaped = config.reward.shaping > 0 and self.learner.critic is not None
        self.actor = Actor(policy, config.exploration, self.learner.net, shaped or self.learner.needs_reachability)
        if idle := unread(config):
            logger.warning(
                "%s does not read rl.%s: what is said there changes nothing", config.algorithm.name, ", rl.".join(idle)
            )
        self.checkpoints = Checkpoints(work / "checkpoints")
        imitates = "imitation" in self.learner.algorithm.NEEDS
        again = config.algorithm.self_imitation > 0
        self.replay = Replay(
            work / "replay", config.algorithm.replay, whole=lambda record: imitates or (again and record.solved)
        )
        self.progress = Progress()
        self.spent = ""  # where the last iteration's time went
        self.evaluations: list[Evaluation] = []

    def run(self, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """To the last iteration. Raises Stopped, after a checkpoint, where `stop` asks for it."""
        self.folders.work.mkdir(parents=True, exist_ok=True)
        config = self.config
        with (
            Collector(self.plan, self.adapter, self.launch, config.workers, config.stages, stop) as collector,
            ExitStack() as stack,
            Bar("reinforcement learning", config.iterations) as bar,
            explain_os_errors(self.folders.work),
        ):
            side = self._side(collector, stack)
            self._resume(side)
            before = filter(self._due, range(self.progress.iteration))
            self.evaluations = [finished(self.folders.evaluations, iteration) for iteration in before]
            for iteration in range(self.progress.iteration, config.iterations):
                bar.update(iteration, self._note())
                try:
                    if self._due(iteration):
                        self._evaluate(collector, side, iteration)
                        bar.update(iteration, self._note())
                    self._iterate(side, iteration)
                except Stopped as err:  # while episodes were under way: nothing has been learned from them
                    self._save(side)
                    raise Stopped(f"stopped in iteration {iteration}; the same command begins it again") from err
                asked = stop()
                if (iteration + 1) % config.checkpoint_every == 0 or iteration + 1 == config.iterations or asked:
                    self._save(side)
                if asked:
                    raise Stopped(f"stopped after iteration {iteration}; the same command goes on from there")
            self._evaluate(collector, side, config.iterations)
            bar.update(config.iterations, self._note())
        return self._outcome()

    def _save(self, side: RolloutSide) -> None:
        self.replay.forget(self.checkpoints.save(self.progress, self.learner.state() | side.state()))

    def _side(self, collector: Collector, stack: ExitStack) -> RolloutSide:
        def of(iteration: int) -> list[EpisodeOrder]:
            return orders(self.config, self.plan, self.seed, iteration, "expert" in self.learner.algorithm.NEEDS)

        collects: Collects = collector
        if not self.placement.one_process:
            collects = stack.enter_context(closing(RolloutProcesses(self._begin)))
        if self.config.algorithm.max_staleness:
            ahead = Ahead(collects, self.actor, of, self.learner, self.config.iterations)
            return stack.enter_context(closing(ahead))
        return OnPolicy(collects, self.actor, of, self.config.iterations)

    def _begin(self, actor: Actor) -> Fleet:
        """Rollout processes where the placement has them."""
        assert self.folder is not None, "rollout processes load the policy themselves"
        config = self.config
        return start_rollout(
            config.placement,
            published(actor),
            CALL,
            worker_settings(self.folder, self.suite, self.worker_settings, config, actor.reachability),
            simulators=config.workers,
            stages=config.stages,
            group_size=config.algorithm.group_size,
            episodes=config.episodes,
            accelerators=torch.cuda.device_count(),
            log=logger.warning,
        )

    def _due(self, iteration: int) -> bool:
        every = self.config.eval_every
        return iteration == 0 or bool(every and iteration % every == 0)

    def _evaluate(self, collector: Collector, side: RolloutSide, iteration: int) -> None:
        begun = time.perf_counter()
        found = self._measured(collector, side, iteration)
        self.evaluations.append(found)
        best = self.progress.best
        if not best or found.successes > best["successes"]:
            self.checkpoints.save_best(self.learner.weights())
            self.progress.best = {"iteration": iteration, "successes": found.successes, "n": len(found.outcomes)}
        self.log({**found.metrics(), "time/evaluation": time.perf_counter() - begun}, iteration)

    def _measured(self, collector: Collector, side: RolloutSide, iteration: int) -> Evaluation:
        side.settle()  # it needs the simulators
        return evaluate(self.policy, self.held_out, collector, self.folders.evaluations, iteration)

    def _iterate(self, side: RolloutSide, iteration: int) -> None:
        begun = time.perf_counter()
        made = side.take(iteration)
        collected = time.perf_counter()
        with torch_threads(self.config.learner.threads):
            earlier = self.replay.before(iteration)
            metrics = self.learner.update(made.records, iteration, self.progress, earlier)
        self.replay.add(iteration, made.records)
        ended = time.perf_counter()
        progress = self.progress
        progress.iteration = iteration + 1
        progress.episodes += len(made.records)
        progress.steps += made.steps
        progress.seconds += ended - begun
        metrics |= {
            "env/episodes": float(progress.episodes),
            "env/steps": float(progress.steps),
            "env/lost_workers": float(made.lost),
            **_times(made, collected - begun, ended - collected),
        }
        rollout, policy = metrics["time/rollout_share"], metrics["time/inference_share"]
        self.spent = f", {metrics['time/step']:.0f} s: rollouts {rollout:.0%} (policy {policy:.0%} of them)"
        self.log(metrics, iteration)
        with self.folders.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")

    def _resume(self, side: RolloutSide) -> None:
        cut_torn_line(self.folders.curve)
        found = self.checkpoints.load()
        if found is None:
            return
        self.progress, tensors = found
        self.learner.load(tensors)
        side.load(tensors, self.progress.iteration)

    def _note(self) -> str:
        best = self.progress.best
        last = f"success {self.evaluations[-1].successes}/{best['n']}" if self.evaluations else ""
        best_of = f", best {best['successes']} before iteration {best['iteration']}" if best else ""
        return f"{last}{best_of}{self.spent}"

    def _outcome(self) -> Outcome:
        rows = read_rows(self.folders.curve, self.config.iterations)
        chosen, weights = self.config.iterations, self.learner.weights()
        if self.config.keep_best and self.progress.best["iteration"] != chosen:
            chosen, weights = self.progress.best["iteration"], self.checkpoints.best()
        whole = {name: tensor.detach().cpu() for name, tensor in self.policy.model.state_dict().items()}
        noise_scale = getattr(self.policy.model.config.expert, "noise_scale", None)
        return Outcome(whole | weights, self.evaluations, chosen, rows, self.held_out, noise_scale)


def _times(made: Collected, rollout_s: float, learning_s: float) -> dict[str, float]:
    """time/*: seconds, and what share of a rollout the policy and the simulators took."""
    whole = rollout_s + learning_s
    return {
        "time/step": whole,
        "time/rollout": rollout_s,
        "time/actor/run_training": learning_s,
        "time/rollout/inference": made.deciding_s,
        "time/rollout/sync_weights": made.transfer_s,
        "time/env/waiting": made.waiting_s,
        "time/rollout_share": rollout_s / whole,
        "time/inference_share": made.deciding_s / rollout_s,
        "time/waiting_share": made.waiting_s / rollout_s,
        "time/sync_weights_share": made.transfer_s / whole,
        "time/env_steps_per_s": made.steps / whole,
    }
