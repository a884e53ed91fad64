"""LIBERO-Plus's task names: what one says is changed, read back so that a list of its tasks can be run here.

A name is a LIBERO task and suffixes: `_view_h_v_scale_rot_vert_initstate_N[_noise_K]`, `_language_N`, `_light_N`,
`_table_N`, `_tb_N`, `_add_N`, `_levelK_sampleJ`. Camera, robot and noise are in the name itself and run here by its
definition; the others name files of LIBERO-Plus's fork (texts, scenes, initial states) and are not guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prts_core.io.errors import ConfigError, DataError
from prts_core.sim.suites.libero.perturb import check

MAX_BYTES, MAX_NAMES, MAX_CHARACTERS = 64 * 2**20, 100_000, 300
# What the files of the fork would be needed for.
FILES = {
    "language": "its rewritten sentences",
    "light": "its scene files",
    "background": "its textures",
    "layout": "its objects and initial states",
}
_VIEW = re.compile(r"_view_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_initstate_(\d+)(?:_noise_(\d+))?$")
_IN_FILES = (
    ("language", re.compile(r"_language_\d+$")),
    ("light", re.compile(r"_light_\d+$")),
    ("background", re.compile(r"_(?:table|tb)_\d+$")),
    ("layout", re.compile(r"_(?:add_\d+|level\d+_sample\d+)$")),
)


@dataclass(frozen=True)
class Named:
    """base: LIBERO's own task. missing: the axes that need the fork's files; none: it can be run."""

    name: str
    base: str
    perturbation: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def parse(name: str) -> Named:
    """What a name says. ConfigError for numbers that LIBERO-Plus does not have (a 51st noise, a 501st start)."""
    perturbation: dict[str, Any] = {}
    missing: list[str] = []
    rest = name.removesuffix(".bddl")
    while True:
        if found := _VIEW.search(rest):
            *view, start, noise = (int(number) if number else 0 for number in found.groups())
            if view != [0, 0, 100, 0, 0]:
                perturbation["camera"] = {"view": view}
            if start:
                perturbation["robot"] = {"index": start, "applied": "posture"}
            if noise:
                perturbation["noise"] = {"index": noise}
            rest = rest[: found.start()]
            continue
        for axis, pattern in _IN_FILES:
            if found := pattern.search(rest):
                missing.append(axis)
                rest = rest[: found.start()]
                break
        else:
            break
    check(perturbation, rest)
    return Named(name.removesuffix(".bddl"), rest, perturbation, tuple(missing))


def read(path: Path, known: Collection[str]) -> list[Named]:
    """Every task of a list: LIBERO-Plus's task_classification.json, or a text with a name a line.

    known: LIBERO's own tasks. DataError for a file that is neither, and for a name over no task of LIBERO's.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError("A list of tasks is too long", file=path, expected=f"{MAX_BYTES} bytes")
        text = path.read_text()
        raw = json.loads(text) if text.lstrip().startswith(("{", "[")) else text.splitlines()
        if isinstance(raw, dict):
            raw = [entry for entries in raw.values() for entry in entries]
        names = [str(entry["name"] if isinstance(entry, dict) else entry).strip() for entry in raw]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        if isinstance(err, DataError):
            raise
        raise DataError(
            "A list of LIBERO-Plus tasks cannot be read",
            file=path,
            found=f"{type(err).__name__}: {str(err)[:200]}",
            expected="task_classification.json, or a text with one task name a line",
        ) from err
    names = [name for name in names if name and not name.startswith("#")]
    if len(names) > MAX_NAMES or any(len(name) > MAX_CHARACTERS for name in names):
        raise DataError("A list of tasks is too long", file=path, expected=f"{MAX_NAMES} names")
    tasks = []
    for name in dict.fromkeys(names):
        try:
            task = parse(name)
        except ConfigError as err:
            raise DataError("A task name is not LIBERO-Plus's", file=path, field=name, found=str(err)) from err
        if task.base not in known and not task.missing:
            raise DataError("A task name stands over no task of LIBERO", file=path, field=name, found=task.base)
        tasks.append(task)
    return tasks
