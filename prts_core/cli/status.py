"""`prts status`: where every step of a recipe stands and why, and what the store holds. Runs nothing."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from prts_core.cli.main import add_plan_arguments, table, tell, typed, wide_console

if TYPE_CHECKING:
    from prts_core.store.status import Status, StatusRow

EPILOG = """\
examples
  prts status
  prts status --config configs/smoke.yaml --verify
  prts status --json | jq '.rows[] | select(.state != "finished")'

states
  finished      its result lies in the store (note "made by other code": the code has changed since, its version not)
  stale         the recipe shows a result of another configuration, behaviour version, seed, source or parent
  running       a process is making it        interrupted  work was left; the same command goes on from there
  missing       never made                    damaged      its files are not those that it made (--verify)
  skipped       optional data is not here     absent       its source is not on this machine

Exit status 1 where --verify finds damage.
"""
COLOURS = {
    "finished": "green",
    "stale": "yellow",
    "running": "cyan",
    "interrupted": "yellow",
    "damaged": "red",
    "absent": "red",
    "missing": "dim",
    "skipped": "dim",
}
SHOWN_REASONS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plan_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON document")
    parser.add_argument(
        "--verify", action="store_true", help="compare contents with their digests (unchanged files are not read)"
    )
    parser.add_argument(
        "--all", action="store_true", help="every reason, work of other plans, and results that no recipe shows"
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.stages import chain, declarations
    from prts_core.store.status import status

    plan = load_plan(args.config, args.overrides)
    found = status(chain.store(args.outputs), plan, declarations.steps(plan), verify=args.verify, listed=args.all)
    tell(found, args.json, partial(show, everything=args.all))
    return 1 if any(row.state == "damaged" for row in found.rows) else 0


def show(found: Status, everything: bool = False) -> None:
    """Print a table of the steps, then the store in a few lines."""
    from rich.filesize import decimal
    from rich.text import Text

    from prts_core.store.stage import step_name

    console = wide_console()
    console.print(Text.assemble((found.recipe, "bold"), f"  {found.config_file} in {found.outputs}"))
    steps = table("stage", "dataset", "state", "")
    for row in found.rows:
        steps.add_row(row.stage, row.partition or "", Text(row.state, COLOURS[row.state]), _about(row, everything))
    console.print(steps)
    store = found.store
    line = f"\nstore: {store.results} results, {decimal(store.bytes)}"
    if store.unshown:
        line += (
            f"; no recipe shows {store.unshown} of them, {decimal(store.unshown_bytes)} (`prts gc` tells what may go)"
        )
    console.print(line, markup=False)
    if store.works and not everything:
        console.print(f"under way or interrupted for other plans: {len(store.works)} (`prts status --all` lists them)")
    for work in store.works if everything else ():
        name = step_name(work["stage"], work["partition"])
        console.print(f"  {name} {work['key'][:12]} {_progress(work)}", markup=False)
        console.print(f"    go on: {work['command']}", markup=False, soft_wrap=True)
    for result in store.listed:
        name, of = (
            step_name(result["stage"], result["partition"]),
            f"{result['recipe'] or ''} {typed(result['overrides'])}",
        )
        console.print(f"  {name} {result['key'][:12]}  {decimal(result['bytes'])}  {of}", markup=False)


def _about(row: StatusRow, everything: bool) -> Any:
    from rich.text import Text

    from prts_core.store.status import when

    lines: list[tuple[str, str]] = []
    if row.state == "finished":
        lines.append(("  ".join(filter(None, [when(row.finished), duration(row.seconds)])), "dim"))
    if row.work is not None:
        running = row.state == "running"
        lines.append((_progress(row.work | {"running": running}), ""))
        lines += [] if running else [(f"go on: {row.command}", "")]
    shown = row.why if everything else row.why[:SHOWN_REASONS]
    lines += [(line, "") for line in shown]
    if len(row.why) > len(shown):
        lines.append((f"and {len(row.why) - len(shown)} more (--all)", "dim"))
    lines += [(note, "yellow") for note in row.notes]
    return Text("\n").join(Text(line, style) for line, style in lines if line)


def _progress(work: dict[str, Any]) -> str:
    from prts_core.store.status import when

    at = "no checkpoint yet" if work["checkpoint"] is None else f"checkpoint at step {work['checkpoint']}"
    recipe = " ".join(filter(None, [work["recipe"], typed(work["overrides"])]))
    if work["running"]:
        who = f"process {work['pid']} on {work['host']} since {when(work['since'])}"
        return f"{who}, {at} ({recipe})" if work["pid"] else "it begins"
    return f"{at}, {duration(work['seconds']) or '0 s'} spent, begun {when(work['since'])} ({recipe})"


def duration(seconds: float | None) -> str:
    """Seconds for a person: 4.2 s, 3 min 10 s, 5 h 20 min; empty for none."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
