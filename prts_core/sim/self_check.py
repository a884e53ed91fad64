"""Whether an installed simulator does what its suites say, asked through a worker as a benchmark would ask.

The family's own check (install.py) looks at packages and files; this one at what comes out.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from prts_core.io.errors import SimulatorError
from prts_core.io.progress import track
from prts_core.policy.observation import STATE
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, launch_for
from prts_core.sim.suite import EpisodeKey, SuiteSpec
from prts_core.sim.suites import suite

STEPS = 8


def check_suites(names: tuple[str, ...], **changes: Any) -> list[dict[str, Any]]:
    """Each suite's first task, reset twice, stepped and looked at; one row a suite with what it took.

    The suites are of one family; `changes` are fields of its WorkerLaunch. SimulatorError names the suite and what is
    wrong.
    """
    rows = []
    with Pool(launch_for(names[0], **changes)) as pool:
        for name in track(names, what="checking"):
            rows.append(_check_suite(pool, suite(name)))
    return rows


def _check_suite(pool: Pool, spec: SuiteSpec) -> dict[str, Any]:
    task = spec.tasks[0]
    key = EpisodeKey(spec.name, task.name, 0, spec.seed)
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (STEPS, len(spec.contract.action)))
    began = time.perf_counter()
    pool.ask(0, protocol.reset(key, observe=False))
    made = time.perf_counter()
    states = []
    for _ in range(2):
        pool.ask(0, protocol.reset(key, observe=False))
        stepping = time.perf_counter()
        pool.ask(0, protocol.step(actions, observe=False, ignore_success=True))
        stepped = time.perf_counter()
        states.append(pool.ask(0, protocol.state())["state"])
    pool.ask(0, protocol.observe())  # the first builds the renderer
    asked = time.perf_counter()
    seen = pool.ask(0, protocol.observe())["observation"]
    observed = time.perf_counter()
    if states[0].tobytes() != states[1].tobytes():
        raise SimulatorError(
            "An episode does not repeat",
            field=f"{spec.name}/{task.name}",
            found=f"states differ by up to {np.abs(states[0] - states[1]).max():.3g} after {STEPS} equal actions",
            expected="the same bits",
        )
    check_observation(spec, seen)
    return {
        "suite": spec.name,
        "task": task.name,
        "tasks": len(spec.tasks),
        "build_s": round(made - began, 2),
        "step_ms": round((stepped - stepping) / STEPS * 1e3, 2),
        "observe_ms": round((observed - asked) * 1e3, 1),
    }


def check_observation(spec: SuiteSpec, seen: dict[str, np.ndarray]) -> None:
    """SimulatorError unless `seen` is what the suite's contract promises, and no camera looks at nothing."""
    contract = spec.contract
    wanted: dict[str, Any] = {STATE: ((len(contract.state),), "float32")}
    wanted |= {camera.key: ((camera.height, camera.width, 3), "uint8") for camera in contract.cameras}
    found = {key: (value.shape, str(value.dtype)) for key, value in seen.items()}
    if found != wanted:
        raise SimulatorError(
            "An observation is not what the suite's contract says", field=spec.name, found=found, expected=wanted
        )
    blank = [camera.key for camera in contract.cameras if seen[camera.key].std() < 1.0]
    if blank or not np.isfinite(seen[STATE]).all():
        raise SimulatorError(
            "A camera shows one colour" if blank else "The state is not finite",
            field=f"{spec.name}/{[*blank, STATE][0]}",
            cure="see whether the renderer works: MUJOCO_GL=osmesa in place of egl, or the other way round",
        )
