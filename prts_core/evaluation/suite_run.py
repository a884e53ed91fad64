"""One policy on one suite, from plan to page: what `prts benchmark --suite` and the nightly run call.

It knows the order of things; each is done elsewhere (plan, actors, runner, results, page).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prts_core.errors import ConfigError
from prts_core.evaluation.actors import Actor, neighbours_matter
from prts_core.evaluation.baselines import published
from prts_core.evaluation.intervals import wilson
from prts_core.evaluation.page import write_page
from prts_core.evaluation.plan import Plan, Settings, make_plan
from prts_core.evaluation.results import (
    counted,
    film_all,
    film_name,
    require_rows,
    summarize,
    to_film,
    write_episodes,
    write_report,
)
from prts_core.evaluation.runner import Runner, missing, open_journal, outcomes
from prts_core.evaluation.sequential import Stop
from prts_core.progress import Bar
from prts_core.sim.adapter import adapt
from prts_core.sim.pool import Launch, Pool, launch_for
from prts_core.sim.suite import SuiteSpec

Say = Callable[[str], None]
Reader = Callable[[Sequence[bool]], Stop | None]


@dataclass(frozen=True)
class Machine:
    """What does not change a row. workers: simulators at once; none: one a core, at most 8. videos: how many.

    launch: changes to how workers are started (fields of prts_core.sim.pool.Launch).
    """

    workers: int | None = None
    videos: int = 6
    launch: Mapping[str, Any] = field(default_factory=dict)


def run_suite(
    actor: Actor, suite: SuiteSpec, settings: Settings, folder: Path, machine: Machine = Machine(), *,
    stop: Callable[[Plan], Reader] | None = None, say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Run what `folder` still lacks and write episodes.parquet, report.json, page.html and videos/ there.

    stop: from the plan, the reader of a sequential test. Returns the report. ContractError where policy and suite do
    not mean the same; StageError where the folder holds another run.
    """
    plan = make_plan(suite, actor.contract.chunk_length, settings)
    adapter = adapt(actor.contract.contract, plan.suite.contract, policy_name="the policy", suite_name=suite.name)
    workers = min(machine.workers or min(8, os.cpu_count() or 1), len(plan.keys))
    if machine.workers is not None and machine.workers < 1:
        raise ConfigError("A benchmark needs workers", field="--workers", found=machine.workers, expected="1 or more")
    reader = None if stop is None else stop(plan)
    for note in adapter.notes:
        say(f"converted between policy and suite: {note}")
    with open_journal(folder / "journal.jsonl", plan, actor, adapter=list(adapter.notes)) as journal:
        todo = missing(plan, journal)
        if len(todo) < len(plan.keys):
            say(f"{len(plan.keys) - len(todo)} of {len(plan.keys)} episodes are done already")
        stopped = None if reader is None else reader(outcomes(plan, journal))
        if todo and stopped is None:
            unstable = neighbours_matter(actor, [task.instruction for task in plan.tasks])
            if unstable:
                journal.note({"kind": "neighbours matter", "what": unstable})
                say(f"rows may depend on which episodes run side by side: {unstable}; --batch 1 rules that out")
            with (
                Pool(_launch(plan, machine), min(workers, len(todo))) as pool,
                Bar(suite.name, len(plan.keys)) as bar,
            ):
                runner = Runner(
                    plan, actor, pool, journal, adapter=adapter, actions=folder / "actions", stop=reader,
                    progress=lambda rows: bar.update(len(rows), score(rows)),
                )  # fmt: skip
                stopped = runner.run()
        rows = counted(plan, journal, stopped)
        require_rows(rows)
        report = summarize(plan, rows, actor, stop=stopped, events=journal.events)
    report["neighbours"] = next((e["what"] for e in journal.events if e.get("kind") == "neighbours matter"), "")
    report["adapter"] = list(adapter.notes)
    report["published"] = published(plan.protocol, report["successes"], report["n"])
    chosen = to_film(plan, rows, machine.videos)
    wanted = [f"videos/{film_name(index, rows[index])}" for index in chosen]
    report["replay_faults"] = []
    if any(not (folder / name).exists() for name in wanted):
        say(f"filming {len(chosen)} episodes, failures first")
        with Pool(_launch(plan, machine), 1) as pool:
            report["replay_faults"] = film_all(pool, plan, rows, chosen, folder)
    report["videos"] = [name for name in wanted if (folder / name).exists()]
    write_episodes(folder / "episodes.parquet", plan, rows)
    write_report(folder, report)
    write_page(folder / "page.html", report, rows)
    return report


def _launch(plan: Plan, machine: Machine) -> Launch:
    suite = plan.suite
    name = f"{suite.family}:{suite.name}" if "." in suite.family else suite.name  # a family of somebody else's
    return launch_for(name, **{"settings": plan.worker_settings, **machine.launch})


def score(rows: Mapping[Any, Mapping[str, Any]]) -> str:
    """Success so far with its 95 % interval, for the progress bar."""
    won = sum(row["success"] for row in rows.values())
    bounds = wilson(won, len(rows))
    return f"success {won}/{len(rows)} = {bounds.estimate:.0%} [{bounds.lower:.0%}, {bounds.upper:.0%}]"
