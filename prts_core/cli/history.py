"""`prts history`: a registered model's success on every suite over its versions, and the trail of its aliases."""

from __future__ import annotations

import argparse
from pathlib import Path

from prts_core.cli.main import add_outputs_argument, wide_console

EPILOG = """\
examples
  prts history prts-quickstart
  prts history models:/prts-quickstart --picture history.png

Results come from the versions' tags: registration records the recipe's own benchmark, `prts regress` every suite of
the recipe (its section `regression`). A star is the champion, red a significant drop against the champion of the time,
a hollow mark the champion run again. Results on stand-in assets say so. Below: every move of @challenger and @champion,
which MLflow keeps as runs of the experiment prts-alias-moves.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name of a registered model, or models:/<name>")
    add_outputs_argument(parser)
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="default: <outputs>/regression/<model>/history.png"
    )


def main(args: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from prts_core.delivery.history import MOVE_COLUMNS, draw, move_rows, read_history, rows

    model = args.model.removeprefix("models:/").split("@")[0].split("/")[0]
    history = read_history(args.outputs, model)
    console = wide_console()
    table = Table(box=None, header_style="bold")
    for name in ("suite", "version", "success, 95 % interval", "gate"):
        table.add_column(name)
    for row in rows(history):
        table.add_row(*row[:3], Text(row[3], "red"))
    console.print(table if history.points else f"no version of {model} has a result yet")
    if history.moves:
        trail = Table(box=None, header_style="bold")
        for name in MOVE_COLUMNS:
            trail.add_column(name)
        for row in move_rows(history.moves):
            trail.add_row(*(Text(cell) for cell in row))
        console.print(trail)
    picture = args.picture or args.outputs / "regression" / model / "history.png"
    if draw(args.outputs, model, picture) is not None:
        console.print(picture, markup=False, soft_wrap=True)
    return 0
