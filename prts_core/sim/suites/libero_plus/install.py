"""Installs LIBERO-Plus's axes: LIBERO itself, and a list of LIBERO-Plus tasks where the user has one.

The home holds a link to LIBERO's venv, tasks.json (the list's tasks that can be run, and why the others cannot) and
installed.json.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from prts_core.io.errors import ConfigError
from prts_core.io.files import digest_file, write_json
from prts_core.sim.installations import Installation
from prts_core.sim.suites.libero.install import check, install_under
from prts_core.sim.suites.libero.spec import BASES
from prts_core.sim.suites.libero.spec import suites as libero_suites
from prts_core.sim.suites.libero_plus import names

__all__ = ["check", "install"]


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """LIBERO, then this layer; what installed.json says.

    assets: a file is a list of LIBERO-Plus tasks (its task_classification.json, or a name a line); a folder is LIBERO's
    assets. Raises what LIBERO's install raises, and DataError for a list that cannot be read.
    """
    listed = Path(assets).expanduser() if assets is not None and Path(assets).expanduser().is_file() else None
    record = install_under(home, None if listed else assets)
    if listed is not None:
        record["list"] = _list(home, listed)
    elif (before := home.installed()) is not None and "list" in before:
        record["list"] = before["list"]
    write_json(home.record, record)
    return record


def _list(home: Installation, path: Path) -> dict[str, Any]:
    own = {task.name for name, suite in libero_suites().items() if name in BASES for task in suite.tasks}
    tasks = names.read(path, own)
    runnable = [task for task in tasks if not task.missing]
    missing = Counter(axis for task in tasks for axis in task.missing)
    if not runnable:
        raise ConfigError(
            "None of a list's tasks can be run here",
            file=path,
            found=", ".join(f"{count} need {names.FILES[axis]}" for axis, count in missing.items()) or "no task",
            expected="tasks of the axes camera, robot or noise",
        )
    write_json(
        home.path / "tasks.json",
        {
            "tasks": [{"name": task.name, "base": task.base, "perturbation": task.perturbation} for task in runnable],
            "left_out": [task.name for task in tasks if task.missing],
        },
    )
    return {"digest": digest_file(path), "tasks": len(runnable), "left_out": dict(missing)}
