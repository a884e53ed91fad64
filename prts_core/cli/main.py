"""The `prts` command: one subcommand a stage, and the tools around them. Prints; decides nothing.

Exit status: 0 done (or skipped with a reason), 1 a fault told in one paragraph, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from rich.console import Console

from prts_core import __version__
from prts_core.errors import PrtsError

DEFAULT_CONFIG = Path("configs/quickstart.yaml")
# Commands that are no stages: name -> module with `add_arguments(parser)` and `main(args) -> int`.
TOOLS = {
    "chain": "prts_core.cli.chain",
    "config": "prts_core.cli.config",
    "dryrun": "prts_core.cli.dryrun",
    "import-policy": "prts_core.cli.import_policy",
    "serve": "prts_core.cli.serve",
    "lineage": "prts_core.cli.lineage",
    "history": "prts_core.cli.history",
    "bench": "prts_core.cli.bench",
    "sim": "prts_core.cli.sim",
}
# Stages that are tools as well: the module also has `wanted(args) -> bool`, by which it takes over from the stage.
STAGE_TOOLS = {
    "convert": "prts_core.cli.convert",
    "validate": "prts_core.cli.validate",
    "stats": "prts_core.cli.stats",
    "benchmark": "prts_core.cli.benchmark",
    "value": "prts_core.cli.value",
}
TOOL_HELP = {
    "chain": "run every stage in order, without Dagster",
    "config": "print a recipe with every default filled in",
    "dryrun": "count a recipe's parameters and estimate its memory on each GPU, without data or weights",
    "import-policy": "turn a checkpoint of the public release into a policy folder",
    "serve": "serve a policy over openpi's websocket protocol",
    "lineage": "print the path from a registered model back to the raw files",
    "history": "print and draw a registered model's success on every suite over its versions",
    "bench": "run a benchmark of the project and print ours beside the peer's",
    "sim": "list, install, check or remove the simulators that benchmarks run in",
}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="recipe (default: %(default)s)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="a.b=c", help="change one value"
    )
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs lie (default: %(default)s)")


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen tool's module is imported, so that `--help` is quick."""
    from prts_core.stages.chain import STAGES

    parser = argparse.ArgumentParser(
        prog="prts",
        description="From robot demonstrations to a served policy that knows how close it is to its goal.",
        epilog="The chain: " + " -> ".join(STAGES) + ", then serve. A finished stage is verified, not run again.",
    )
    parser.add_argument("--version", action="version", version=f"prts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for stage in STAGES.values():
        sub = commands.add_parser(stage.name, help=stage.help, description=stage.help)
        add_plan_arguments(sub)
        if stage.partitioned:
            sub.add_argument("--dataset", help="which dataset (default: the one the recipe deploys)")
        if stage.name in STAGE_TOOLS:
            importlib.import_module(STAGE_TOOLS[stage.name]).add_arguments(sub)
    for name, module in TOOLS.items():
        sub = commands.add_parser(name, help=TOOL_HELP[name], description=TOOL_HELP[name])
        if name == chosen:
            importlib.import_module(module).add_arguments(sub)
    return parser


def run_stage_command(args: argparse.Namespace, console: Console) -> int:
    from prts_core.config.load import load_plan
    from prts_core.stages import chain
    from prts_core.stages.processes import launched, run_stage_together

    plan, partition = load_plan(args.config, args.overrides), getattr(args, "dataset", None)
    if launched() > 1:
        together = run_stage_together(chain.STAGES[args.command], plan, partition, args.outputs)
        if together is None:
            return 0
        manifest = together
    else:
        manifest = chain.run(args.command, plan, partition, args.outputs)
    if manifest.skipped:
        console.print(f"[yellow]{args.command} skipped:[/] {manifest.skipped}", highlight=False)
        return 0
    name = args.command + (f" [{manifest.partition}]" if manifest.partition else "")
    console.print(f"{name}: {manifest.folder(args.outputs)}  {manifest.digest[:19]}", highlight=False, markup=False)
    for metric, value in manifest.metrics.items():
        console.print(f"  {metric} = {value:.6g}", highlight=False)
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    console = Console(soft_wrap=True)
    chosen = argv[0] if argv else None
    try:
        args = build_parser(chosen).parse_args(argv)
        if args.command in TOOLS:
            return importlib.import_module(TOOLS[args.command]).main(args)
        if args.command in STAGE_TOOLS and (tool := importlib.import_module(STAGE_TOOLS[args.command])).wanted(args):
            return tool.main(args)
        return run_stage_command(args, console)
    except PrtsError as err:
        Console(stderr=True, soft_wrap=True).print(f"error: {err}", style="red", highlight=False, markup=False)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
