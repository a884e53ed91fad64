"""Read the `prts` command line: one subcommand a stage, and the tools around them. Prints; decides nothing.

Exit status: 0 done, 1 a fault told in one paragraph, 3 skipped (an optional dataset is not here), 75 stopped on request
after a checkpoint, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prts_core import __version__
from prts_core.config.places import outputs_folder, recipe_path
from prts_core.io.errors import PrtsError, Skipped, Stopped, missing_extra
from prts_core.store.stage import step_name

if TYPE_CHECKING:
    from rich.table import Table

SKIPPED, STOPPED, INTERRUPTED = 3, 75, 130  # exit statuses
# Commands that are no stages: each the module of its name, with `add_arguments(parser)`, `main(args) -> int` and, where
# its help ends with examples, EPILOG.
TOOLS = {
    "chain": "run every stage in order, without Dagster",
    "register": "register the package in MLflow as @challenger, and promote it where the rule allows",
    "regress": "measure a registered version on the recipe's suites beside the champion, and promote by the rule",
    "promote": "make a registered version champion where the rule allows, or say what stands against it",
    "rollback": "make the earlier champion champion again",
    "status": "say what of a recipe is finished, stale and why, running or interrupted",
    "diff": "compare two results: configuration, sources, parents, metrics",
    "gc": "list, and on request delete, results that nothing refers to",
    "dvc": "write the DVC file of a recipe",
    "config": "print a recipe with every default filled in",
    "dryrun": "count a recipe's parameters and estimate its memory on each GPU, without data or weights",
    "import-policy": "turn a checkpoint of the public release into a policy folder",
    "export-policy": "write a policy in the layout of the public release",
    "serve": "serve a policy over openpi's or GR00T's protocol",
    "replay": "send recorded episodes, or what a robot asks its server, through a policy and compare the actions",
    "lineage": "print the path from a registered model back to the raw files",
    "history": "print and draw a registered model's success over its versions, and the trail of its aliases",
    "bench": "run a benchmark: ours beside a peer's, or what this machine's GPU does",
    "sim": "list, install, check or remove the simulators that benchmarks run in",
    "skill": "check, install, list, search or begin skill packages, and hold them against robots",
}
STAGE_TOOLS = (
    "convert",
    "validate",
    "stats",
    "benchmark",
    "value",
)  # tools as well, where an option of theirs is given


EXAMPLES = """\
examples
  prts {name}
  prts {name} --config configs/my_recipe.yaml{dataset}
{typed}  prts config {name}
      prints the values that this stage gets; {source}

Exit status: 0 done, or found finished; 1 a fault; 3 skipped (an optional dataset is not here); 75 stopped on request
after a checkpoint and 130 interrupted (the same command goes on from there).
"""


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=recipe_path(), help="recipe (default: $PRTS_RECIPE, here %(default)s)"
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_argument(parser)
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=c",
        help="change one value of the recipe; may be repeated, the last one wins",
    )
    add_outputs_argument(parser)


def add_dtype_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="what the policy computes in; auto: bf16 on a GPU, fp32 on a CPU (default: %(default)s)",
    )


def add_outputs_argument(parser: argparse.ArgumentParser, what: str = "where results lie") -> None:
    parser.add_argument(
        "--outputs", type=Path, default=outputs_folder(), help=f"{what} (default: $PRTS_OUTPUTS, here %(default)s)"
    )


def wide_console() -> Console:
    """For tables: a file has no width, and one of 80 columns would break every word."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)


def plain_console(stderr: bool = False) -> Console:
    """For sentences: nothing in a name or a path is markup, and no line is broken."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def table(*columns: str, right: Container[str] = (), **look: Any) -> Table:
    """A table without lines. right: columns of figures. look: of rich's Table."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False, **look)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def typed(overrides: Iterable[str] | None) -> str:
    """The `--set` options as they were typed."""
    return " ".join(f"--set {text}" for text in overrides or ())


def tell(found: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    """Print what a command found as one JSON document, or as `show` does."""
    if as_json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        show(found)


def stage_examples(name: str, partitioned: bool) -> str:
    """The end of a stage's help: commands to copy, and where the keys of --set come from."""
    example = {
        "pretrain": "train.steps=50",
        "sft": "train.steps=50",
        "subtask": "train.steps=50",
        "rl": "iterations=20",
        "benchmark": "episodes=4",
        "value": "episodes=12",
        "package": "name=my-policy",
    }.get(name)
    return EXAMPLES.format(
        name=name,
        dataset=" --dataset my_dataset" if partitioned else "",
        typed=f"  prts {name} --set {name}.{example}\n" if example else "",
        source=f"--set changes them as {name}.<key>" if example else "their YAML is the dataset's, robot's and model's",
    )


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the chosen tool's module is imported, so that `--help` is quick."""
    from prts_core.stages.declarations import STAGES

    parser = argparse.ArgumentParser(
        prog="prts",
        description="From robot demonstrations to a served policy that knows how close it is to its goal.",
        epilog="The chain: " + " -> ".join(STAGES) + ", then serve. A finished stage is verified, not run again.",
    )
    parser.add_argument("--version", action="version", version=f"prts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for stage in STAGES.values():
        sub = commands.add_parser(
            stage.name,
            help=stage.help,
            description=stage.help,
            epilog=stage_examples(stage.name, stage.partitioned),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_plan_arguments(sub)
        if stage.partitioned:
            sub.add_argument("--dataset", help="which dataset (default: the one the recipe deploys)")
        sub.add_argument(
            "--launch",
            metavar="WHERE",
            help="inline, process or torchrun:N: where the stage's function runs (default: $PRTS_LAUNCH, else inline)",
        )
        sub.add_argument(
            "--allow-skip",
            action="store_true",
            help="take an optional dataset that is not here for done: exit status 0, and the recipe's view says so",
        )
        if stage.name in STAGE_TOOLS:
            module, of_stage = module_of(stage.name), vars(sub.parse_args([]))
            module.add_arguments(sub)
            both = vars(sub.parse_args([]))
            sub.set_defaults(of_tool={name: both[name] for name in both.keys() - of_stage.keys()})
            if hasattr(module, "EPILOG"):
                sub.epilog = f"{sub.epilog}\n{module.EPILOG}"
    for name, what in TOOLS.items():
        sub = commands.add_parser(
            name, help=what, description=what, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            sub.epilog = getattr(module_of(name), "EPILOG", None)
            module_of(name).add_arguments(sub)
    return parser


def module_of(command: str) -> ModuleType:
    return importlib.import_module(f"prts_core.cli.{command.replace('-', '_')}")


def asks_for_tool(args: argparse.Namespace) -> bool:
    """Whether an option is given that the stage does not have, but the tool of its name."""
    return any(getattr(args, name) != blank for name, blank in getattr(args, "of_tool", {}).items())


def run_stage_command(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.launch.signals import stop_on_signals
    from prts_core.launch.where import default_launch, parse_launch
    from prts_core.stages import chain

    plan, partition = load_plan(args.config, args.overrides), getattr(args, "dataset", None)
    plan.read_all()  # a fault in any file is told before any work
    plan.dataset(partition)
    launch = parse_launch(args.launch, "--launch") if args.launch else default_launch()
    try:
        with stop_on_signals():
            manifest = chain.run(args.command, plan, partition, args.outputs, launch=launch)
    except Skipped as err:
        if args.allow_skip:
            chain.note_skip(args.command, plan, partition, args.outputs, err)
            _say(f"skipped: {err}", "yellow")
            return 0
        raise
    name, console = step_name(args.command, manifest.partition), plain_console()
    console.print(f"{name}: {manifest.folder(args.outputs)}  {manifest.digest[:19]}")
    for metric, value in manifest.metrics.items():
        console.print(f"  {metric} = {value:.6g}")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    chosen = argv[0] if argv else None
    try:
        args = build_parser(chosen).parse_args(argv)
        if args.command in TOOLS or asks_for_tool(args):
            return module_of(args.command).main(args)
        return run_stage_command(args)
    except Skipped as err:
        _say(f"skipped: {err}", "yellow")
        return SKIPPED
    except Stopped as err:
        _say(f"stopped: {err}", "yellow")
        return STOPPED
    except PrtsError as err:
        _say(f"error: {err}", "red")
        return 1
    except ModuleNotFoundError as err:
        if (told := missing_extra(err)) is None:
            raise
        _say(f"error: {told}", "red")
        return 1
    except KeyboardInterrupt as err:
        print(str(err) or "interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _say(text: str, style: str) -> None:
    plain_console(stderr=True).print(text, style=style)


if __name__ == "__main__":
    sys.exit(main())
