"""`prts lineage`: follow a registered model or a package back to the raw files, as a tree or as JSON."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from prts_core.cli.main import add_outputs_argument, tell, wide_console

if TYPE_CHECKING:
    from rich.tree import Tree

    from prts_core.delivery.lineage import Lineage, Step

EPILOG = """\
examples
  prts lineage models:/prts-quickstart@champion
  prts lineage models:/prts-quickstart/3 --json
  prts lineage outputs/runs/quickstart/package/output --verify

Every step shows its manifest's digest, its MLflow run, its Dagster run and the git commit. A step that is gone from the
store, or was made again and came out different, is followed through MLflow and marked. Exit status 1 when a step is
lost or damaged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="models:/<name>@<alias>, models:/<name>/<version>, or a package folder")
    add_outputs_argument(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, every raw file included")
    parser.add_argument("--verify", action="store_true", help="read every output again and compare its digest")
    parser.add_argument(
        "--files", type=int, default=4, metavar="N", help="raw files shown a dataset (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.delivery.lineage import trace

    lineage = trace(args.model, args.outputs, args.verify)
    tell(lineage, args.json, lambda found: wide_console().print(tree(found, args.files)))
    return 1 if any(step.state in ("lost", "damaged") for step in lineage.steps.values()) else 0


def tree(lineage: Lineage, files: int = 4) -> Tree:
    """The steps as a rich tree; a step that several others share is spread out once and named after that."""
    from rich.markup import escape
    from rich.tree import Tree

    about = "\n".join(f"{key.replace('_', ' ')} {value}" for key, value in lineage.model.items() if value)
    root = Tree(f"[bold]{escape(lineage.reference)}[/]\n[dim]{escape(about)}[/]")
    shown: set[str] = set()

    def grow(branch: Tree, step: Step) -> None:
        if step.digest in shown:
            branch.add(f"{escape(step.name)} {step.digest[7:19]} [dim](above)[/]")
            return
        shown.add(step.digest)
        here = branch.add(_label(step))
        for row in step.files[:files]:
            here.add(f"[dim]{escape(str(row['path']))}  sha256:{row['sha256'][:12]}  {row.get('size', '?')} bytes[/]")
        if len(step.files) > files:
            size = sum(int(row.get("size", 0)) for row in step.files)
            here.add(f"[dim]... {len(step.files)} raw files in all, {size / 1e6:.1f} MB; --json lists every digest[/]")
        for parent in lineage.parents(step):
            grow(here, parent)

    grow(root, lineage.steps[lineage.root])
    return root


def _label(step: Step) -> str:
    from rich.markup import escape

    colour = {"on disk": "green", "gone": "yellow", "remade": "yellow"}.get(step.state, "red")
    note = f" ({step.note})" if step.note else ""
    git = step.git_sha[:12] + (" + changes" if step.git_dirty == "true" else "") if step.git_sha else ""
    links = {"mlflow run": step.mlflow_run, "dagster run": step.dagster_run, "git": git, "dvc": step.dvc_rev[:20]}
    facts = "  ".join(f"{name} {value}" for name, value in links.items() if value and value != "none")
    first = f"[bold]{escape(step.name)}[/] {step.digest[7:19]} [{colour}]{escape(step.state + note)}[/]"
    return first + (f"\n[dim]{escape(facts)}[/]" if facts else "")
