"""Read cases of data/rskills: manifests, robots, and variations of them with the reference's verdicts (its README)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prts_core.config.places import shared_folder
from prts_core.io.plain_yaml import parse

DATA = shared_folder() / "data" / "rskills"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no reference data at {DATA}: PRTS_SHARED names the folder")


def verdicts(name: str) -> Any:
    """The content of a verdicts file; an empty list where the data is not here."""
    path = DATA / name
    return json.loads(path.read_text()) if path.is_file() else []


def plain(path: Path) -> Any:
    """A file's YAML or JSON as plain data."""
    return json.loads(path.read_text()) if path.suffix == ".json" else parse(path.read_text())


def manifests() -> dict[str, Path]:
    """Every package of the data, by its path there."""
    found = (path.parent for path in sorted(DATA.glob("*/*/rskill.yaml")))
    return {path.relative_to(DATA).as_posix(): path for path in found}


def changed(base: Any, set_: dict[str, Any], delete: list[str]) -> Any:
    """`base` with dotted paths set and deleted; a number in a path is a place in a list."""
    out = copy.deepcopy(base)
    for dotted, value in set_.items():
        place, last = _place(out, dotted)
        place[last] = copy.deepcopy(value)
    for dotted in delete:
        place, last = _place(out, dotted)
        place.pop(last, None) if isinstance(place, dict) else place.pop(last)
    return out


def _place(out: Any, dotted: str) -> tuple[Any, Any]:
    *path, last = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    for part in path:
        out = out[part]
    return out, last


def short(case: dict[str, Any]) -> str:
    """A name for a variation."""
    said = {k: v for k, v in case.items() if k not in ("base", "accepts", "errors") and v}
    return f"{case.get('base', '')}: {json.dumps(said)}"[:110]
