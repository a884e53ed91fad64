"""The chain's benchmark: a policy and its controls on one suite, each condition a run of its own, resumable to the
episode.

Conditions: policy, expert (the suite's own), blind_replay (mean training trajectory), untrained (same network, random
weights), black_images, swapped (the pair's sentences exchanged); then early and noisy, which only make failures for the
value's AUROC. `benchmark_policy` takes folders and returns the report.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from prts_core.config.schema import CONTROLS, BenchmarkConfig
from prts_core.config.sources import ExpertSource
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError
from prts_core.io.files import atomic_path, digest_value, write_json
from prts_core.policy.observation import Acts
from prts_core.policy.policy import load_policy, policy_digest, untrained_policy
from prts_core.rollout.controls import (
    PLAIN,
    ActionNoise,
    ActsLike,
    BlackImages,
    Control,
    NoOpPolicy,
    OpenLoopReplay,
    SwappedInstruction,
    mean_trajectory,
)
from prts_core.rollout.episode_plan import SuiteSettings, make_plan
from prts_core.rollout.local_policy import LocalPolicy, local_identity
from prts_core.rollout.page import write_page
from prts_core.rollout.published_results import published
from prts_core.rollout.recording import RecordedRun, write_rollouts
from prts_core.rollout.results import SCHEMA, rounded, summarize, timing
from prts_core.rollout.run_suite import ExecutionOptions, SuiteOutcome, run_plan, show, simulators_for
from prts_core.rollout.runner import NO_EXPERT, ExpertRunner, Runner
from prts_core.sim.adapter import adapt
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites import suite, task_of
from prts_core.statistics.binomial import wilson

# Of torch, on a CPU. Two share a batch between them, so that an answer's last bits depend on its place in it, and that
# on which worker was quicker. With one they did not, wherever it was tried (AVX-512); where they do, the run says so.
THREADS = 1
CONDITIONS = ("policy", *CONTROLS, "early", "noisy")
RATES = {
    "success_rate": "policy",
    "untrained_success_rate": "untrained",
    "blind_replay_success_rate": "blind_replay",
    "swapped_success_rate": "swapped",
    "black_image_success_rate": "black_images",
}


@dataclass(frozen=True)
class BenchmarkFolders:
    """Folders of one benchmark. early: an earlier checkpoint of the same training, or none. work: resume state.
    timing: the file for what depends on the machine and the hour, if anybody wants it; nothing in `output` does."""

    policy: Path
    dataset: Path | None
    early: Path | None
    work: Path
    output: Path
    timing: Path | None = None


def benchmark_policy(
    config: BenchmarkConfig, places: BenchmarkFolders, conditions: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Run what is not yet in `places.work`; write episodes.parquet, report.json, page.html, videos and, where asked
    for, rollouts to `places.output`. conditions: none for the policy and the recipe's controls."""
    for what, named, known in (("controls", config.controls, CONTROLS), ("record", config.record, CONDITIONS)):
        if unknown := sorted(set(named) - set(known)):
            raise ConfigError(
                "The benchmark has no such condition",
                field=f"benchmark.{what}",
                found=unknown[0],
                expected=", ".join(known),
            )
    if conditions is None:
        conditions = ("policy", *(name for name in CONTROLS if name in config.controls))
    with closing(ControlledBenchmark(config, places)) as bench:
        for condition in conditions:
            getattr(bench, f"run_{condition}")()
        if "policy" in conditions and config.failures_wanted:
            bench.make_failures()
        return bench.finish()


def measured(config: BenchmarkConfig) -> tuple[SuiteSpec, SuiteSettings, dict[str, Any]]:
    """(suite, what of it is run, settings of its workers): what the recipe says, else where the dataset comes from."""
    spec, tasks, size, made = suite_and_tasks(config, "benchmark")
    count = len(dict.fromkeys(tasks)) or len(spec.tasks)
    each = spec.episodes_per_task if config.episodes is None else config.episodes
    settings = SuiteSettings(
        episodes=count * each,
        tasks=tasks,
        seed=config.seed,
        execute=config.execute_steps,
        perturbation=dict(config.perturbation),
        image_size=size,
        skip_states=config.skip_states or 0,
    )
    return spec, settings, made


class NamesSuite(Protocol):
    """A stage's configuration that may say where the deployed dataset's robot is simulated."""

    @property
    def dataset(self) -> str: ...
    @property
    def source(self) -> Any: ...
    @property
    def suite(self) -> str | None: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int | None: ...


def suite_and_tasks(config: NamesSuite, section: str) -> tuple[SuiteSpec, tuple[str, ...], int | None, dict[str, Any]]:
    """(suite, tasks, picture size, settings of its workers): what the recipe's section says, else where the dataset was
    recorded. ConfigError where neither tells."""
    source, name, tasks, size = config.source, config.suite, config.tasks, config.image_size
    made: dict[str, Any] = {}
    if name is None and isinstance(source, ExpertSource):
        name, made = source.suite, source.settings
        tasks, size = tasks or source.tasks, size or source.image_size
    if name is None:
        raise ConfigError(
            "Nothing says where this dataset's robot can be simulated",
            field=f"{section}.suite",
            found=config.dataset,
            expected="a suite of `prts sim list`",
        )
    return suite(name, made), tasks, size, made


class ControlledBenchmark:
    """One policy on one suite; a method a condition, which adds to `runs`."""

    def __init__(self, config: BenchmarkConfig, places: BenchmarkFolders) -> None:
        self.config, self.places = config, places
        self.spec, self.settings, made = measured(config)
        self.policy, self.digest = load_policy(places.policy, config.dtype), policy_digest(places.policy)
        self.contract = self.policy.contract
        self.plan = make_plan(self.spec, self.contract.chunk_length, self.settings)
        self.each = len(self.plan.keys) // len(self.plan.tasks)
        self.adapter = adapt(self.contract.contract, self.plan.suite.contract, suite_name=self.spec.name)
        launch = {"settings": {**made, **self.plan.worker_settings}}
        self.simulators = simulators_for(self.plan, ExecutionOptions(config.workers, launch=launch))
        self.runs: list[RecordedRun] = []
        self.results: dict[str, SuiteOutcome] = {}
        self.under_test = self._wrap(self.policy, {}, values=True)

    def close(self) -> None:
        self.simulators.close()

    def _wrap(self, policy: Acts, more: dict[str, Any], *, values: bool = False, batch: int = 0) -> LocalPolicy:
        identity = local_identity(self.policy, self.digest) | more
        fill = self.policy.device.type == "cpu"
        return LocalPolicy(
            policy, identity, batch=batch or self.config.batch, values=values, fill=fill, threads=THREADS
        )

    def _run(
        self,
        condition: str,
        policy: LocalPolicy,
        *,
        tasks: Sequence[Task] | None = None,
        control: Control = PLAIN,
        how: type[Runner] = Runner,
        noise: float = 0.0,
        execute: int | None = None,
    ) -> None:
        chosen = self.plan.tasks if tasks is None else tuple(tasks)
        if not chosen:
            return
        settings = replace(
            self.settings,
            tasks=tuple(task.name for task in chosen),
            episodes=self.each * len(chosen),
            execute=execute or self.plan.execute,
        )
        plan = make_plan(self.spec, policy.contract.chunk_length, settings)
        policy.identity |= {"condition": condition, "noise": noise}
        name = f"{condition}-{noise:g}" if noise else condition
        folder = self.places.work / name
        made = run_plan(
            plan,
            policy,
            folder,
            self.simulators,
            self.adapter,
            how=how,
            control=control,
            what=name,
            probe=condition == "policy",
        )
        self.runs.append(RecordedRun(condition, noise, plan, made.rows, folder / "actions"))
        self.results[name] = made

    # ---- the conditions ------------------------------------------------------------------------------------------
    def run_policy(self) -> None:
        self._run("policy", self.under_test)

    def run_expert(self) -> None:
        still = NoOpPolicy(self.contract, 1)
        self._run("expert", self._wrap(still, {"expert": self.spec.family}, batch=1), how=ExpertRunner, execute=1)

    def run_blind_replay(self) -> None:
        if self.places.dataset is None:
            return
        dataset = LeRobotDataset.open(self.places.dataset)
        found = {task.name: mean_trajectory(dataset, task.instruction) for task in self.plan.tasks}
        played = {name: self.adapter.actions(rows) for name, rows in found.items() if rows is not None}
        tasks = [task for task in self.plan.tasks if task.name in played]
        longest = max((task.max_steps for task in tasks), default=1)
        digest = digest_value({name: rows.tolist() for name, rows in played.items()})
        policy = self._wrap(NoOpPolicy(self.contract, longest), {"trajectories": digest}, batch=1)
        self._run("blind_replay", policy, tasks=tasks, control=OpenLoopReplay(played), execute=longest)

    def run_untrained(self) -> None:
        policy = untrained_policy(self.places.policy, self.plan.seed, self.policy.dtype, self.policy.device)
        self._run("untrained", self._wrap(policy, {"weights": self.plan.seed}))

    def run_black_images(self) -> None:
        self._run("black_images", self._wrap(self.policy, {}), control=BlackImages())

    def run_swapped(self) -> None:
        pair = self.config.swap_pair
        if pair is None:
            return
        first, second = (task_of(self.spec, name) for name in pair)
        other = SwappedInstruction({first.name: second.instruction, second.name: first.instruction})
        tasks = [task for task in self.plan.tasks if task.name in pair]
        self._run("swapped", self._wrap(self.policy, {"pair": list(pair)}), tasks=tasks, control=other)

    def make_failures(self) -> None:
        """Values are the evaluated policy's own, whoever acts; a task that has failed enough is left out."""
        share = -(-self.config.failures_wanted // len(self.plan.tasks)) + 1
        if self.places.early is not None and (tasks := self._lacking(share)):
            early = load_policy(self.places.early, self.policy.dtype)
            like = ActsLike(early, self.policy, self.contract)
            acts = policy_digest(self.places.early)
            self._run("early", self._wrap(like, {"acts": acts}, values=True), tasks=tasks)
        for level in self.config.action_noise:
            shaken = ActionNoise(level, self.plan.suite.contract)
            policy = self._wrap(self.policy, {}, values=True)
            self._run("noisy", policy, tasks=self._lacking(share), control=shaken, noise=level)

    def _lacking(self, share: int) -> list[Task]:
        rows = [row for run in self.runs if run.condition in ("policy", "early", "noisy") for row in run.rows]
        failed = {task.name: sum(not r["success"] for r in rows if r["task"] == task.name) for task in self.plan.tasks}
        return [task for task in self.plan.tasks if failed[task.name] < share]

    # ---- what is left behind -------------------------------------------------------------------------------------
    def finish(self) -> dict[str, Any]:
        output = self.places.output
        output.mkdir(parents=True, exist_ok=True)
        frame = self._frame()
        with atomic_path(output / "episodes.parquet") as partial:
            frame.write_parquet(partial)
        report = self._report(frame)
        if "policy" in self.results:
            report |= self._show(output)
        recorded = [run for run in self.runs if run.condition in self.config.record]
        if recorded:
            report["record_faults"] = write_rollouts(self.simulators, recorded, output / "rollouts")
        write_json(output / "report.json", report)
        if self.places.timing is not None:
            write_json(self.places.timing, {name: timing(m.rows, m.events) for name, m in self.results.items()})
        return report

    def _frame(self) -> pl.DataFrame:
        rows = [
            row
            | {
                "condition": run.condition,
                "noise": run.noise,
                "standins": self.plan.suite.standins,
                "max_steps": next(task.max_steps for task in run.plan.tasks if task.name == row["task"]),
            }
            for run in self.runs
            for row in run.rows
        ]
        return pl.DataFrame(rows, schema=SCHEMA | {"max_steps": pl.Int64, "noise": pl.Float64})

    def _report(self, frame: pl.DataFrame) -> dict[str, Any]:
        """Totals, tasks and what they were measured with; it becomes part of the package."""
        events = [event for made in self.results.values() for event in made.events]
        return {
            **rates(frame, self.plan.tasks),
            "suite": self.spec.name,
            "labels": [self.plan.suite.standins] if self.plan.suite.standins else [],
            "source": self.plan.suite.source,
            "protocol_digest": self.plan.protocol_digest,
            "adapter": list(self.adapter.notes),
            "without_expert": {event["task"]: event["what"] for event in events if event.get("kind") == NO_EXPERT},
            "policy_digest": self.digest,
            "dtype": self.policy.dtype,
        }

    def _show(self, output: Path) -> dict[str, Any]:
        """Videos of the policy, failures of each task first, and its page."""
        run, made = self.runs[0], self.results["policy"]
        assert run.condition == "policy", "it is run first"
        chosen = first_of_each(run.rows, self.config.videos_per_task)
        videos, faults = show(self.simulators, run.plan, run.rows, chosen, run.folder.parent)
        (output / "videos").mkdir(exist_ok=True)
        for name in videos:
            shutil.copyfile(run.folder.parent / name, output / name)
        page = summarize(run.plan, run.rows, self.under_test, stop=None) | {
            "neighbours": made.neighbours,
            "adapter": list(self.adapter.notes),
            "videos": videos,
            "replay_faults": faults,
        }
        page["published"] = published(run.plan.protocol, page["successes"], page["n"])
        write_page(output / "page.html", page, run.rows)
        return {"replay_faults": faults}


def first_of_each(rows: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Indices of up to `count` rows a task, failures first."""
    chosen: dict[str, list[int]] = {}
    for index in sorted(range(len(rows)), key=lambda index: bool(rows[index]["success"])):
        own = chosen.setdefault(rows[index]["task"], [])
        if len(own) < count:
            own.append(index)
    return sorted(index for own in chosen.values() for index in own)


def rates(frame: pl.DataFrame, tasks: Sequence[Task]) -> dict[str, Any]:
    """Means over tasks of every condition, and the table of tasks with Wilson intervals."""

    def rate(condition: str, task: str) -> float | None:
        rows = frame.filter((pl.col("condition") == condition) & (pl.col("task") == task))
        return None if rows.is_empty() else float(rows["success"].mean())  # type: ignore[arg-type]

    def mean(condition: str) -> float | None:
        found = [r for task in tasks if (r := rate(condition, task.name)) is not None]
        return round(float(np.mean(found)), 4) if found else None

    table = {}
    for task in tasks:
        rows = frame.filter((pl.col("condition") == "policy") & (pl.col("task") == task.name))
        n, successes = len(rows), int(rows["success"].sum())
        table[task.name] = {
            "instruction": task.instruction,
            "n": n,
            "successes": successes,
            "wilson95": rounded(wilson(successes, n)),
            "expert": rate("expert", task.name),
            "blind_replay": rate("blind_replay", task.name),
            "max_steps": task.max_steps,
        }
    return {key: mean(condition) for key, condition in RATES.items()} | {"tasks": table}
