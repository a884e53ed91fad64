"""One policy on one suite, from plan to page: what `prts benchmark --suite` and the nightly run call.

It knows the order of things; each is done elsewhere (plan, policy, runner, results, page).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prts_core.io.errors import ConfigError, SimulatorError
from prts_core.io.files import write_json
from prts_core.io.journal import Row
from prts_core.io.progress import Bar
from prts_core.rollout.controls import PLAIN, Control
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.rollout.local_policy import PolicyUnderTest, neighbours_matter
from prts_core.rollout.page import interval_of, write_page
from prts_core.rollout.published_results import published
from prts_core.rollout.results import (
    choose_videos,
    summarize,
    timing,
    video_name,
    write_episodes,
    write_videos,
)
from prts_core.rollout.runner import KEY, Runner, finished, missing, open_journal, outcomes, row_key
from prts_core.sim.adapter import Adapter, adapt
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import SuiteSpec
from prts_core.statistics.binomial import wilson
from prts_core.statistics.sprt import Stop

NEIGHBOURS = "neighbours matter"
Say = Callable[[str], None]
Reader = Callable[[Sequence[bool]], Stop | None]


@dataclass(frozen=True)
class ExecutionOptions:
    """What does not change a row. workers: simulators at once; none: one a core, at most 8. videos: how many.

    launch: changes to how workers are started (fields of prts_core.sim.pool.WorkerLaunch).
    """

    workers: int | None = None
    videos: int = 6
    launch: Mapping[str, Any] = field(default_factory=dict)


def run_suite(
    policy: PolicyUnderTest,
    suite: SuiteSpec,
    settings: SuiteSettings,
    folder: Path,
    machine: ExecutionOptions = ExecutionOptions(),
    *,
    stop: Callable[[EpisodePlan], Reader] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Run what `folder` still lacks and write episodes.parquet, report.json, timing.json, page.html and videos/ there.

    stop: from the plan, the reader of a sequential test. Returns the report. ContractError where policy and suite do
    not mean the same; StageError where the folder holds another run.
    """
    plan = make_plan(suite, policy.contract.chunk_length, settings)
    adapter = adapt(policy.contract.contract, plan.suite.contract, policy_name="the policy", suite_name=suite.name)
    for note in adapter.notes:
        say(f"converted between policy and suite: {note}")
    with simulators_for(plan, machine) as simulators:
        made = run_plan(
            plan,
            policy,
            folder,
            simulators,
            adapter,
            stop=None if stop is None else stop(plan),
            say=say,
        )
        rows = made.rows
        if not rows:
            raise SimulatorError("No episode was finished", cure="run the same command again")
        report = summarize(plan, rows, policy, stop=made.stopped)
        took = timing(rows, made.events)
        report["neighbours"] = made.neighbours
        report["adapter"] = list(adapter.notes)
        report["published"] = published(plan.protocol, report["successes"], report["n"], interval_of(report)[0])
        chosen = choose_videos(plan, rows, machine.videos)
        report["videos"], report["replay_faults"] = show(simulators, plan, rows, chosen, folder, say=say)
    write_episodes(folder / "episodes.parquet", plan, rows)
    write_json(folder / "report.json", report)
    write_json(folder / "timing.json", took)
    write_page(folder / "page.html", report, rows, took)
    return report


@dataclass(frozen=True)
class SuiteOutcome:
    """rows: what the result is about, in the plan's order. events: the journal's. neighbours: "" or what changed."""

    rows: list[Row]
    events: list[Row]
    stopped: Stop | None

    @property
    def neighbours(self) -> str:
        return next((event["what"] for event in self.events if event.get("kind") == NEIGHBOURS), "")


def simulators_for(plan: EpisodePlan, options: ExecutionOptions) -> Pool:
    """Workers for plans of one suite."""
    suite, workers = plan.suite, min(8, os.cpu_count() or 1) if options.workers is None else options.workers
    if workers < 1:
        raise ConfigError("A benchmark needs workers", field="workers", found=workers, expected="1 or more")
    name = f"{suite.family}:{suite.name}" if "." in suite.family else suite.name  # a family of somebody else's
    return Pool(launch_for(name, **{"settings": plan.worker_settings, **options.launch}), workers)


def run_plan(
    plan: EpisodePlan,
    policy: PolicyUnderTest,
    folder: Path,
    simulators: Pool,
    adapter: Adapter,
    *,
    how: type[Runner] = Runner,
    control: Control = PLAIN,
    stop: Reader | None = None,
    what: str = "",
    probe: bool = True,
    say: Say = lambda text: None,
) -> SuiteOutcome:
    """Run what `folder` still lacks of the plan. StageError where the folder holds another run.

    what: for the progress bar; none: the suite. probe: look first whether an answer depends on its neighbours.
    """
    with open_journal(folder / "journal.jsonl", plan, policy, adapter=list(adapter.notes)) as journal:
        todo = missing(plan, journal)
        if len(todo) < len(plan.keys):
            say(f"{len(plan.keys) - len(todo)} of {len(plan.keys)} episodes are done already")
        stopped = None if stop is None else stop(outcomes(plan, journal))
        if todo and stopped is None:
            unstable = neighbours_matter(policy, [task.instruction for task in plan.tasks]) if probe else ""
            if unstable:
                journal.note({"kind": NEIGHBOURS, "what": unstable})
                say(f"rows may depend on which episodes run side by side: {unstable}; --batch 1 rules that out")
            with Bar(what or plan.suite.name, len(plan.keys)) as bar:
                stopped = how(
                    plan,
                    policy,
                    simulators,
                    journal,
                    adapter=adapter,
                    actions=folder / "actions",
                    control=control,
                    stop=stop,
                    progress=lambda rows: bar.update(len(rows), score(rows)),
                ).run()
            if stopped is not None:
                simulators.close()  # some are in the middle of an episode
        read = finished(plan, journal)
        if stopped is not None:  # what the test has read, and nothing of what ran beside it
            known = {row_key(plan.keys[index]) for index in plan.order[: stopped.at]}
            read = [row for row in read if tuple(row[name] for name in KEY) in known]
        return SuiteOutcome(read, journal.events, stopped)


def show(
    simulators: Pool,
    plan: EpisodePlan,
    rows: Sequence[Row],
    chosen: Sequence[int],
    folder: Path,
    say: Say = lambda text: None,
) -> tuple[list[str], list[str]]:
    """Film those episodes that are not filmed yet; (videos that there are, what went wrong)."""
    wanted = [f"videos/{video_name(index, rows[index])}" for index in chosen]
    faults: list[str] = []
    if any(not (folder / name).exists() for name in wanted):
        say(f"filming {len(chosen)} episodes, failures first")
        faults = write_videos(simulators, plan, rows, chosen, folder)
    return [name for name in wanted if (folder / name).exists()], faults


def score(rows: Mapping[Any, Mapping[str, Any]]) -> str:
    """Success so far with its 95 % interval, for the progress bar."""
    won = sum(row["success"] for row in rows.values())
    bounds = wilson(won, len(rows))
    return f"success {won}/{len(rows)} = {bounds.estimate:.0%} [{bounds.lower:.0%}, {bounds.upper:.0%}]"
