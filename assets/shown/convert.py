"""Show a converted dataset: rows, episodes, and a column a feature of its info.json."""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.metadata import Shown
from prts_core.io.files import read_json


def extra(output: Path) -> dict[str, Any]:
    info = read_json(output / "meta" / "info.json")
    columns = [
        dg.TableColumn(name, feature["dtype"], description=_names(feature))
        for name, feature in info["features"].items()
    ]
    return {
        "dagster/row_count": int(info["total_frames"]),
        "dagster/column_schema": dg.TableSchema(columns),
        "episodes": int(info["total_episodes"]),
        "fps": float(info["fps"]),
    }


def _names(feature: dict[str, Any]) -> str:
    """The shape, and the names of its entries where the dataset says them."""
    names = feature.get("names")
    listed = names if isinstance(names, list) else [n for part in (names or {}).values() for n in part]
    return f"{feature['shape']}" + (f": {', '.join(map(str, listed))}" if listed else "")


SHOWN = Shown(extra=extra)
