"""Does what families have in common that run in a Python of their own: read a worker's settings, check that an episode
repeats. Needs numpy only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.suite import Environment, SuiteSpec

Pictures = dict[str, np.ndarray]
PLACEMENTS = ("stored", "drawn")


def read_settings(
    title: str,
    settings: Mapping[str, Any],
    scenes: int,
    placements: Sequence[str] = PLACEMENTS,
    cure: str | None = None,
) -> tuple[int, int | None, str]:
    """(`tasks`, how many scenes to keep built; `image_size`, of the pictures, none for the suite's; `placement`).

    scenes: kept where nothing is said. cure: for a placement that is none of `placements`. ConfigError for any other
    setting.
    """
    found = {"tasks": scenes, "image_size": None, "placement": placements[0]} | dict(settings)
    tasks, size, placement = found.pop("tasks"), found.pop("image_size"), found.pop("placement")
    known = "tasks, image_size, placement"
    if found:
        raise ConfigError(f"{title} has no such setting", field="settings", found=min(found), expected=known)
    if placement not in placements:
        allowed = ", ".join(placements)
        raise ConfigError(
            f"{title} has no such placement", field="placement", found=placement, expected=allowed, cure=cure
        )
    if size is not None and not (isinstance(size, int) and 16 <= size <= 1024):
        raise ConfigError("Not a size of pictures", field="image_size", found=size, expected="16 to 1024")
    return int(tasks), size, placement


def check_repeats(
    environment: Environment, suite: SuiteSpec, initial_state: int, seed: int, actions: np.ndarray
) -> tuple[np.ndarray, Pictures, dict[str, Any]]:
    """(state, pictures, report) in which an episode of the suite's first task ends, once it was repeated behind one of
    its second."""
    task, other = suite.tasks[:2]
    begin = time.perf_counter()

    def episode() -> tuple[np.ndarray, Pictures]:
        environment.reset(suite, task, initial_state, seed)
        for action in actions:
            environment.step(action)
        return environment.state(), environment.images()

    state, pictures = episode()
    environment.reset(suite, other, 0, seed)
    for action in actions:
        environment.step(action)
    again, same = episode()
    expect(np.array_equal(state, again), f"an episode run twice ends elsewhere (by {np.abs(state - again).max():g})")
    for key, picture in pictures.items():
        expect(np.array_equal(picture, same[key]), f"an episode run twice does not look the same ({key})")
        expect(float(picture.std()) > 10, f"camera {key} sees nothing")
    stepping = time.perf_counter()
    for action in actions:
        environment.step(action)
    stepped = time.perf_counter()
    environment.images()
    end = time.perf_counter()
    return (
        state,
        pictures,
        {
            "family": suite.family,
            "task": task.name,
            "repeats_exactly": True,
            "step_ms": round((stepped - stepping) / len(actions) * 1e3, 2),
            "observe_ms": round((end - stepped) * 1e3, 1),
            "seconds": round(end - begin, 1),
        },
    )


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"self-check: {otherwise}")


def report(check: Callable[[Path], dict[str, Any]]) -> None:
    """Print, as the last line, what `check` says of the home that the command line names."""
    print(json.dumps(check(Path(sys.argv[1]))))
