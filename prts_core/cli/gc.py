"""`prts gc`: list what nothing refers to in the store, and remove it with --delete."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prts_core.cli.main import add_outputs_argument, table, tell, typed, wide_console

if TYPE_CHECKING:
    from prts_core.store.gc import Garbage

EPILOG = """\
examples
  prts gc                        what could go, and how much it holds
  prts gc --delete               remove it
  prts gc --delete --keep-days 2 --config configs/quickstart.yaml --config configs/mine.yaml

Never removed: what a recipe under outputs/runs shows, the plans of the recipes that are given (by default
$PRTS_RECIPE), registered models, running work, interrupted work and results younger than --keep-days (a result's age
counts from when it was last asked for), and all that these were made from.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        metavar="RECIPE",
        help="a recipe whose results stay; may be repeated (default: $PRTS_RECIPE)",
    )
    add_outputs_argument(parser)
    parser.add_argument("--delete", action="store_true", help="remove what is listed; without it nothing is changed")
    parser.add_argument(
        "--keep-days",
        type=float,
        default=14.0,
        metavar="N",
        help="results and interrupted work younger than this stay (default: %(default)g)",
    )
    parser.add_argument(
        "--ignore-registry", action="store_true", help="do not ask MLflow which results are registered models"
    )
    parser.add_argument("--json", action="store_true", help="print the list as one JSON document")


def main(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.config.places import recipe_paths
    from prts_core.io.errors import ConfigError, StageError
    from prts_core.stages import chain, declarations
    from prts_core.store.gc import delete_garbage, find_garbage, plan_keys

    if not args.keep_days >= 0:
        raise ConfigError("An age cannot be negative", field="--keep-days", found=args.keep_days, expected=">= 0")
    outputs: Path = args.outputs
    keys: set[str] = set()
    for path in args.config or [path for path in recipe_paths() if path.exists()]:
        plan = load_plan(path)
        more, notes = plan_keys(chain.store(outputs), plan, declarations.steps(plan))
        keys |= more
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    registered: set[str] = set()
    if not args.ignore_registry:
        try:
            registered = registered_results(outputs)
        except StageError as err:
            if args.delete:
                raise StageError(
                    "Nothing was removed: MLflow cannot say which results are registered models",
                    file=err.file,
                    found=err.found,
                    expected=err.expected,
                    cure="start the server, or `export MLFLOW_TRACKING_URI=` "
                    "of where the models are, and run the same command again; --ignore-registry asks nobody",
                ) from err
            print(f"note: {err} Registered models are not left out below.", file=sys.stderr)
    if args.delete:
        found = delete_garbage(
            outputs,
            keys=keys,
            registered=registered,
            keep_days=args.keep_days,
            on_wait=lambda: print("waiting for a stage that looks for its parents", file=sys.stderr),
        )
    else:
        found = find_garbage(outputs, keys=keys, registered=registered, keep_days=args.keep_days)
    tell(found, args.json, show)
    return 0


def registered_results(outputs: Path) -> set[str]:
    """Keys (of older versions: manifest digests) of every registered model's package. StageError when MLflow cannot be
    asked. An outputs folder that has never tracked anything has none."""
    from prts_core.delivery.registry import versions
    from prts_core.io.errors import StageError
    from prts_core.io.files import read_json
    from prts_core.tracking.store import client, has_store, mlflow_module, recorded_uri, tracking_uri

    for path in sorted((outputs / "registrations").glob("*.json")):
        known = read_json(path).get("tracking_uri")
        if known != recorded_uri(outputs):
            raise StageError(
                "A model of this store is registered in another MLflow than the one that is asked",
                file=path,
                found=recorded_uri(outputs),
                expected=known,
            )
    if not has_store(outputs):
        return set()
    tags = ("prts.key", "prts.manifest_digest")
    try:
        return {v.tags[tag] for v in versions(client(outputs)) for tag in tags if tag in v.tags}
    except (mlflow_module().exceptions.MlflowException, OSError) as err:
        raise StageError("MLflow does not list its models", file=tracking_uri(outputs), found=str(err)[:300]) from err


def show(found: Garbage) -> None:
    """Print what may go (or went) as a table, and why the rest stays in one line."""
    from rich.filesize import decimal

    console = wide_console()
    if found.items:
        items = table("what", "stage", "dataset", "key", "of", "days", "frees", right=("days", "frees"))
        for item in found.items:
            items.add_row(
                item.what,
                item.stage,
                item.partition or "",
                item.key[:12],
                f"{item.recipe} {typed(item.overrides)}".strip(),
                f"{item.age_days:.1f}",
                decimal(item.bytes),
            )
        console.print(items, markup=False)
    done = "removed" if found.deleted else "could go"
    console.print(f"{len(found.items)} {done}, {decimal(found.bytes)}", markup=False)
    stays = ", ".join(f"{count} by {reason}" for reason, count in found.kept.items() if count)
    console.print(f"results that stay: {stays or 'none'} (age: {found.keep_days:g} days)", markup=False)
    if found.items and not found.deleted:
        console.print("`prts gc --delete` removes them", markup=False)
