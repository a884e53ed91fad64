"""Say where recipes, outputs and reference data lie: read from the environment, the same for every command.

$PRTS_RECIPE and $PRTS_OUTPUTS are read by prts, make, Dagster and DVC alike.
"""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_RECIPE = "configs/quickstart.yaml"
DEFAULT_OUTPUTS = "outputs"
DEFAULT_SHARED = str(Path(__file__).resolve().parents[2].parent / "shared")  # the folder beside the project's checkout


def recipe_paths() -> list[Path]:
    """The recipes that $PRTS_RECIPE names, separated by commas; at least one."""
    named = [part.strip() for part in os.environ.get("PRTS_RECIPE", "").split(",") if part.strip()]
    return [Path(part).expanduser() for part in named or [DEFAULT_RECIPE]]


def recipe_path() -> Path:
    """The recipe of a command that takes one: the first of `recipe_paths`."""
    return recipe_paths()[0]


def outputs_folder() -> Path:
    """Where everything that runs write lies: $PRTS_OUTPUTS, by default `outputs` here."""
    return Path(os.environ.get("PRTS_OUTPUTS") or DEFAULT_OUTPUTS).expanduser()


def shared_folder() -> Path:
    """Where reference data lies: $PRTS_SHARED, by default the folder `shared` beside the project."""
    return Path(os.environ.get("PRTS_SHARED") or DEFAULT_SHARED).expanduser()
