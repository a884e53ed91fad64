"""`prts benchmark --policy P --suite S`: a policy in closed loop on a simulation suite, resumable to the episode.

What is run is prts_core.rollout's, what is judged prts_core.delivery's. Without --policy and --suite it
is the stage.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from prts_core.cli.main import add_dtype_argument, plain_console
from prts_core.io.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from prts_core.rollout.episode_plan import EpisodePlan

EPILOG = """\
With --policy and --suite this is a tool and runs no stage:

  prts benchmark --policy models:/prts-quickstart@champion --suite metaworld --episodes 120
      120 episodes, tasks in turn, on a worker a core; episodes.parquet, report.json, timing.json, page.html and videos
      of failures under outputs/benchmark/. Interrupted or killed, the same command goes on with the next episode; with
      more --episodes it adds to those there are. Other settings, or another policy, need another --output.
  prts benchmark --policy ws://robot-gpu:8000 --suite libero_object --episodes 500 --patience 600
      the same through a policy server (`prts serve`); while it is away its episodes wait, up to 600 seconds
  prts benchmark --policy ws://gpu:8000 --suite libero_object --contract suite
      an openpi server of somebody else's, which states no contract: say what its numbers mean. Nobody can check that,
      nor which policy it is; the results are labelled so, and its noise is its own
  prts benchmark --policy P --suite libero_object,libero_spatial --compare outputs/benchmark/champion
      beside an earlier run on the same initial states: paired difference, exact McNemar test (Holm's correction over
      the suites), and the verdict of the promotion gate. Exit status 4 where a suite is significantly worse
  prts benchmark --policy P --suite libero_object --stop-early 0.75,0.90
      is the rate 0.90 or only 0.75? A sequential test reads the episodes in the plan's order and ends the run as soon
      as it knows, wrong at most --alpha and --beta of the time. With --compare: is one better by that much?
      The interval reported holds after such a stop, and so does a stopped comparison's p-value.
      `prts bench sequential` prints what this saves and the error rates of 10,000 simulated runs

The simulators: prts sim list, prts sim install libero. Rows are the same whatever the number of workers and after any
kill (times lie in timing.json): noise is drawn from (seed, task, initial state, step), and batches are filled to one
size. Where a policy's answer still depends on its neighbours the run says so; --batch 1 rules it out.
"""
WORSE = 4  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool = parser.add_argument_group("as a tool")
    tool.add_argument(
        "--policy",
        metavar="POLICY",
        help="a policy or package folder, models:/<name>@<alias> or /<version>, or ws://host:port of a policy server",
    )
    tool.add_argument("--suite", metavar="NAME[,NAME]", help="which suites; `prts sim list` shows them")
    tool.add_argument("--episodes", type=int, metavar="N", help="a suite, in all (default: its protocol's)")
    tool.add_argument(
        "--task", action="append", default=[], dest="tasks", metavar="NAME", help="only this task; may be repeated"
    )
    tool.add_argument("--workers", type=int, metavar="N", help="simulators at once (default: one a core, at most 8)")
    tool.add_argument(
        "--batch", type=int, metavar="N", help="observations a policy is asked at once (default: 1; 8 on a GPU)"
    )
    tool.add_argument("--execute", type=int, metavar="K", help="actions before it looks again (default: 10, or all)")
    tool.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="pixels the simulator renders, for a policy trained on such pictures (default: the suite's)",
    )
    tool.add_argument("--seed", type=int, help="of initial states and noise (default: the suite's)")
    add_dtype_argument(tool)
    tool.add_argument("--no-values", action="store_true", help="do not ask for values")
    tool.add_argument(
        "--videos", type=int, default=6, metavar="N", help="how many are kept, failures first (default: %(default)s)"
    )
    tool.add_argument("--patience", type=float, default=300.0, metavar="S", help="seconds a server may be away")
    tool.add_argument(
        "--api-key-env", default="PRTS_API_KEY", metavar="NAME", help="variable with the server's key (%(default)s)"
    )
    tool.add_argument(
        "--contract",
        metavar="C",
        help="what the numbers of an openpi server mean that does not say so: suite (as the suite's own), a policy's "
        "folder, or a contract's file",
    )
    tool.add_argument("--output", type=Path, metavar="DIR", help="default: <outputs>/benchmark/<policy>")
    tool.add_argument("--compare", type=Path, metavar="RUN", help="an earlier --output, or a folder with its parquet")
    tool.add_argument("--margin", type=float, default=-0.05, help="of the gate, with --compare (default: %(default)s)")
    tool.add_argument("--stop-early", metavar="p0,p1", help="the two rates that must be told apart")
    tool.add_argument("--alpha", type=float, default=0.05, help="of --stop-early and --compare (default: %(default)s)")
    tool.add_argument("--beta", type=float, default=0.05, help="of --stop-early (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    from prts_core.delivery.open_policy import open_policy
    from prts_core.rollout.episode_plan import SuiteSettings
    from prts_core.rollout.remote_policy import named_contract
    from prts_core.rollout.run_suite import ExecutionOptions, run_suite
    from prts_core.sim.suites import suite as suite_of

    console = plain_console()
    for name in ("policy", "suite"):
        if getattr(args, name) is None:
            raise ConfigError(
                "A benchmark on a suite needs a policy and a suite",
                field=f"--{name}",
                found="nothing",
                cure="give both --policy and --suite, or neither to run the stage; `prts benchmark --help` shows "
                "examples",
            )
    suites = [suite_of(name) for name in dict.fromkeys(filter(None, args.suite.split(",")))]
    rates = read_rates(args.stop_early)
    output = (
        args.output or args.outputs / "benchmark" / (re.sub(r"[^A-Za-z0-9.@-]+", "-", args.policy).strip("-")[-80:])
    )
    earlier = {spec.name: earlier_run(args.compare, spec.name) for spec in suites} if args.compare else {}
    settings = SuiteSettings(args.episodes, tuple(args.tasks), args.seed, args.execute, image_size=args.image_size)
    machine = ExecutionOptions(args.workers, args.videos)
    policy = open_policy(
        args.policy,
        batch=default_batch(args),
        values=not args.no_values,
        patience_s=args.patience,
        api_key=os.environ.get(args.api_key_env) or None,
        outputs=args.outputs,
        dtype=args.dtype,
        contract=None if args.contract is None else named_contract(args.contract, suites[0].contract),
    )
    reports = {}
    try:
        for spec in suites:
            if spec.standins:
                console.print(f"{spec.name}: {spec.standins}", style="yellow")
            stop = early_stop(rates, args, earlier.get(spec.name), console)
            reports[spec.name] = run_suite(
                policy,
                spec,
                settings,
                output / spec.name,
                machine,
                stop=stop,
                say=console.print,
            )
            console.print(shown(reports[spec.name]))
            console.print(str(output / spec.name / "page.html"))
    finally:
        policy.close()
    return compare(earlier, reports, output, args, console) if earlier else 0


def default_batch(args: argparse.Namespace) -> int:
    """A batch costs a CPU as much as its samples one by one, and a GPU little more than one."""
    if args.batch is not None:
        return int(args.batch)
    if args.policy.startswith(("ws://", "wss://")):
        return 1
    import torch

    return 8 if torch.cuda.is_available() else 1


def read_rates(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as err:
        raise ConfigError("Two rates are needed", field="--stop-early", found=text, expected="0.75,0.90") from err
    return low, high


def earlier_run(folder: Path, suite: str) -> Path:
    """The folder of that suite in an earlier run."""
    for path in (folder / suite, folder):
        if (path / "episodes.parquet").is_file():
            return path
    raise DataError(
        "The run to compare with has no episodes of this suite",
        file=folder,
        field=suite,
        found="no episodes.parquet",
        cure="give the --output of a finished `prts benchmark` on the same suite",
    )


def early_stop(
    rates: tuple[float, float] | None, args: argparse.Namespace, earlier: Path | None, console: Console
) -> Any:
    """plan -> reader of a sequential test, or none; a test that cannot keep its error rates is refused first."""
    from prts_core.statistics.after_stopping import read_pairs, read_rate
    from prts_core.statistics.sprt import PairedTest, RateTest

    if rates is None:
        return None

    def reader(plan: EpisodePlan) -> Any:
        most = len(plan.keys)
        if earlier is None:
            made = RateTest(*rates, most, args.alpha, args.beta, len(plan.tasks)).checked()
            console.print(
                f"stops early: at most {most} episodes, on average {made.expected(rates[1]):.0f} at a rate of "
                f"{rates[1]:g} and {made.expected(rates[0]):.0f} at {rates[0]:g}; wrong at most {args.alpha:g} and "
                f"{args.beta:g} of the time"
            )
            return partial(read_rate, made)
        pairs = PairedTest(*rates, most, args.alpha, args.beta, len(plan.tasks)).checked()
        before = paired_outcomes(earlier, plan)
        return partial(read_pairs, pairs, before)

    return reader


def paired_outcomes(earlier: Path, plan: EpisodePlan) -> list[bool]:
    """What the earlier run made of the plan's episodes, as its `order` has them. DataError where it lacks one."""
    from prts_core.delivery.gate import policy_episodes

    table = {row[:-1]: row[-1] for row in policy_episodes(earlier / "episodes.parquet").iter_rows()}
    keys = [(key.task, key.initial_state, key.seed) for key in (plan.keys[index] for index in plan.order)]
    absent = [key for key in keys if key not in table]
    if absent:
        raise DataError(
            "The run to compare with lacks episodes of this plan",
            file=earlier,
            found=f"{len(absent)} missing, first {{}}, initial state {{}}, seed {{}}".format(*absent[0]),
            cure="ask for as many --episodes, with the same --task and --seed, as it has",
        )
    return [table[key] for key in keys]


def shown(report: dict[str, Any]) -> Table:
    from prts_core.rollout.page import interval_of

    (low, high), method = interval_of(report)
    title = (
        f"{report['suite']}: {report['successes']}/{report['n']} = {report['success_rate']:.1%} [{low:.1%}, {high:.1%}]"
    )
    if stop := report["stopped_early"]:
        title += f"; stopped early: {stop['decision']} (interval {method})"
    table = Table(title=Text("; ".join([title, *report["labels"]])))
    axes = report["axes"]  # a perturbed suite's tasks may be thousands
    for column in ("axis" if axes else "task", "success", "Wilson 95 %", *(() if axes else ("steps to success",))):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, one in (axes or report["tasks"]).items():
        bounds = "[{:.0%}, {:.0%}]".format(*one["wilson95"])
        cells: list[Text | str] = [Text(name), f"{one['successes']}/{one['n']}", Text(bounds)]
        if not axes:
            cells.append("-" if one["steps_of_successes"] is None else str(one["steps_of_successes"]))
        table.add_row(*cells)
    return table


def compare(
    earlier: dict[str, Path], reports: dict[str, Any], output: Path, args: argparse.Namespace, console: Console
) -> int:
    """The paired comparison of every suite, by the chain's gate; WORSE where one is significantly worse."""
    from prts_core.delivery.comparison import compare_runs
    from prts_core.io.files import write_json

    made = compare_runs(earlier, {name: output / name for name in reports}, margin=args.margin, alpha=args.alpha)
    for name, one in made["suites"].items():
        console.print(
            f"{name}: {one['reason']}; {'sequential' if one['stopped'] else 'McNemar'} p = {one['p_value']:.3g}, "
            f"Holm {one['p_holm']:.3g}"
        )
        for label in one["labels"]:
            console.print(f"  {label}", style="yellow")
    worse: Sequence[str] = made["worse"]
    console.print(
        f"verdict: {'significantly worse on ' + ', '.join(worse) if worse else 'no significant drop'}; "
        f"{'may be promoted' if made['promote'] else 'may not be promoted'} (margin {args.margin:g})",
        style="red" if worse else "green",
    )
    write_json(output / "comparison.json", made)
    return WORSE if worse else 0
