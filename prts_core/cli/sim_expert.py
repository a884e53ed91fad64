"""`prts sim expert` and `prts sim demonstrate`: scripted experts measured, or recorded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prts_core.config.places import outputs_folder
from prts_core.io.errors import ConfigError
from prts_core.io.files import write_json

ACTIONS = ("expert", "demonstrate")


def add_arguments(actions: Any) -> None:
    expert = actions.add_parser("expert", help="measure a suite's scripted experts")
    demonstrate = actions.add_parser("demonstrate", help="record a suite's scripted experts as HDF5")
    for sub in (expert, demonstrate):
        sub.add_argument("--suite", required=True, help="a suite of `prts sim list`")
        sub.add_argument("--task", action="append", help="only this task (may be repeated)")
        sub.add_argument("--noise", default="0", help="levels of the pushes that shake it, taken in turn: 0,0.2")
        sub.add_argument("--workers", type=int, default=1, help="simulator processes (default 1)")
        sub.add_argument(
            "--first", type=int, default=0, help="number of the first attempt (default 0), to share them out"
        )
    expert.add_argument("--episodes", type=int, default=50, help="attempts a task (default 50)")
    expert.add_argument("--seed", type=int, help="default: the suite's")
    expert.add_argument("--output", metavar="DIR", help="default: <outputs>/experts/<suite>")
    demonstrate.add_argument("--episodes", type=int, default=50, help="successes a task (default 50)")
    demonstrate.add_argument("--seed", type=int, default=100_000, help="away from the suite's own (default 100000)")
    demonstrate.add_argument("--output", metavar="DIR", required=True)
    demonstrate.add_argument("--image-size", type=int, default=128, help="pixels (default 128)")
    demonstrate.add_argument("--tail", type=int, default=0, help="rows recorded after success (default 0)")
    demonstrate.add_argument(
        "--placement",
        choices=("drawn", "stored"),
        default="drawn",
        help="start from states drawn by the simulator's own sampler, so that the stored ones stay held out (default), "
        "or from the stored ones",
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.sim.expert_recorder import RecorderSettings, demonstrate, recording
    from prts_core.sim.pool import Pool, launch_for
    from prts_core.sim.suites import suite, task_of

    if args.episodes < 1 or args.workers < 1 or args.first < 0:
        found = f"{args.episodes}, {args.workers}, {args.first}"
        raise ConfigError("Not a count", field="--episodes, --workers, --first", found=found)
    spec = suite(args.suite)
    names, noise = tuple(args.task or ()), _levels(args.noise)
    seed = spec.seed if args.seed is None else args.seed
    if args.action == "demonstrate":
        settings = recording(
            spec,
            names,
            args.episodes,
            image_size=args.image_size,
            stored=args.placement == "stored",
            noise=noise,
            seed=seed,
            tail_steps=args.tail,
            first=args.first,
        )
    else:
        names = tuple(task_of(spec, name).name for name in names) or tuple(task.name for task in spec.tasks)
        settings = RecorderSettings(spec.name, names, args.episodes, noise, seed=seed, record=False, first=args.first)
    output = Path(args.output or outputs_folder() / "experts" / spec.name)
    with Pool(launch_for(args.suite, settings=settings.worker_settings), args.workers) as pool:
        made = demonstrate(spec, settings, pool, output)
    rows = [row_of(attempts) for attempts in made]
    write_json(output / "experts.json", {"suite": spec.name, "standins": spec.standins, "tasks": rows})
    show(spec.name, spec.standins, rows)
    print(output, file=sys.stderr)
    return 0


def row_of(attempts: Any) -> dict[str, Any]:
    """One task's successes with Wilson's 95 % interval; steps: mean over its successes."""
    from prts_core.statistics.binomial import wilson

    known = attempts.known.values()
    rate = wilson(attempts.successes, len(known))
    steps = [row["steps"] for row in known if row["success"]]
    return {
        "task": attempts.task.name,
        "successes": attempts.successes,
        "attempts": len(known),
        "rate": rate.estimate,
        "lower": rate.lower,
        "upper": rate.upper,
        "steps": round(sum(steps) / len(steps), 1) if steps else None,
        "failed_initial_states": sorted(row["initial_state"] for row in known if not row["success"]),
    }


def show(suite: str, standins: str, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "task", "success", "rate", "95 % interval", "steps", title=f"{suite}{', ' if standins else ''}{standins}"
    )
    for row in rows:
        table.add_row(
            row["task"],
            f"{row['successes']}/{row['attempts']}",
            f"{row['rate']:.2f}",
            f"{row['lower']:.2f} to {row['upper']:.2f}",
            str(row["steps"]),
        )
    Console().print(table)


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError as err:
        raise ConfigError("Not levels of noise", field="--noise", found=text, expected="numbers: 0,0.2") from err
    if any(not 0 <= level <= 1 for level in levels):
        raise ConfigError("A level of noise out of range", field="--noise", found=text, expected="0 to 1")
    return levels
