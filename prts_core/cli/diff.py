"""`prts diff`: why two results differ, down to the first cause, and their metrics beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.cli.main import add_outputs_argument, table, tell, typed, wide_console

if TYPE_CHECKING:
    from rich.tree import Tree

    from prts_core.store.diff import Comparison, Difference, Results

EPILOG = """\
examples
  prts diff 3f2a 91bc                                 two keys, or their beginnings
  prts diff smoke:sft quickstart:sft:metaworld        what two recipes show
  prts diff outputs/runs/mine/package models:/prts-mine@champion
  prts diff sft/3f2a9c sft/91bc04 --json

Both must be results of one stage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("left", "right"):
        parser.add_argument(
            name, help="a key or its beginning, stage/key, recipe:stage[:dataset], a folder, or models:/<name>@<alias>"
        )
    add_outputs_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON document")


def main(args: argparse.Namespace) -> int:
    from prts_core.store.diff import Results, compare

    results = Results(args.outputs)
    left, right = (find(results, text, args.outputs) for text in (args.left, args.right))
    found = compare(results, left, right)
    tell(found, args.json, show)
    return 0


def find(results: Results, text: str, outputs: Path) -> dict[str, Any]:
    """The manifest that `text` names; of a registered model, its package's."""
    if not text.startswith("models:"):
        return results.find(text)
    from prts_core.delivery.registry import resolve_version
    from prts_core.io.errors import StageError
    from prts_core.tracking.store import client

    key = resolve_version(client(outputs), text).tags.get("prts.key", "")
    made = results.manifest(key)
    if made is None:
        raise StageError(
            f"The package of {text} is not in this store",
            file=outputs,
            found=key or "no tag prts.key",
            expected="a result of stage package",
            cure="give the outputs folder it was made in with --outputs",
        )
    return made


def show(found: Comparison) -> None:
    """Print causes first, then the tree that leads to them, then the two sides beside each other."""
    from rich.text import Text

    from prts_core.cli.status import duration
    from prts_core.store.status import when

    console = wide_console()
    if found.difference is None:
        console.print("one and the same result", style="green")
        return
    console.print("why they differ", style="bold")
    for cause in found.causes:
        console.print(f"  {cause}", markup=False)
    if found.same_content:
        console.print("  their contents are equal all the same, byte for byte", style="green")
    if found.difference.parents:
        console.print(_tree(found.difference))
    sides = table("", "left", "right", "difference", right=("difference",))
    for name, read in (
        ("key", lambda side: side["key"][:12]),
        ("recipe", lambda side: f"{side['recipe'] or ''} {typed(side['overrides'])}".strip()),
        ("finished", lambda side: when(side["finished"])),
        ("took", lambda side: duration(side["seconds"])),
        ("code", lambda side: (side["code"] or "")[7:19]),
        ("contracts", lambda side: ", ".join(f"{k} {v[7:15]}" for k, v in side["contracts"].items())),
    ):
        left, right = read(found.left), read(found.right)
        style = "" if left == right or name in ("key", "finished", "took") else "yellow"
        sides.add_row(name, Text(left, style), Text(right, style), "")
    for name, (before, after) in found.metrics.items():
        change = "" if before is None or after is None or before == after else f"{after - before:+.4g}"
        sides.add_row(Text(name, "dim"), _number(before), _number(after), change)
    console.print(sides)


def _tree(difference: Difference, into: Tree | None = None) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    label = f"{escape(difference.name)} [dim]{difference.left[:12]} -> {difference.right[:12]}[/]"
    here = Tree(label) if into is None else into.add(label)
    for line in difference.lines:
        here.add(f"[yellow]{escape(line)}[/]")
    for parent in difference.parents:
        _tree(parent, here)
    return here


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
