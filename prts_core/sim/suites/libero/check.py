"""LIBERO's self-check, run in the simulator's own Python: `python -m prts_core.sim.suites.libero.check <home>`.

One line of JSON at the end says what was found; a failed check is an exit status and a sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.sim.suites.libero.environment import CAMERAS, LiberoEnvironment
from prts_core.sim.suites.libero.spec import FAMILY, suites_of

SUITE, STEPS, SEED = "libero_object", 20, 7
TOLERANCE = 1e-9  # m, rad: of positions after some steps; LIBERO builds its scene anew, so the solver starts colder


def main(home: Path) -> dict[str, Any]:
    suite = suites_of(home / "tasks.json")[SUITE]
    task, other = suite.tasks[:2]
    environment = LiberoEnvironment(home)
    actions = np.random.default_rng(SEED).uniform(-1, 1, (STEPS, len(suite.contract.action)))

    def episode() -> tuple[np.ndarray, dict[str, np.ndarray]]:
        environment.reset(suite, task, 3, SEED)
        for action in actions:
            environment.step(action)
        return environment.state(), environment.images()

    begin = time.perf_counter()
    state, pictures = episode()
    environment.reset(suite, other, 0, SEED)
    for action in actions:
        environment.step(action)
    again, same = episode()
    expect(np.array_equal(state, again), "an episode run twice does not end in the same state")
    for key in CAMERAS:
        expect(np.array_equal(pictures[key], same[key]), f"an episode run twice does not look the same ({key})")
        expect(float(pictures[key].std()) > 10, f"camera {key} sees nothing")
    step_begin = time.perf_counter()
    for action in actions:
        environment.step(action)
    step_ms = (time.perf_counter() - step_begin) / STEPS * 1e3
    observe_begin = time.perf_counter()
    environment.images()
    observe_ms = (time.perf_counter() - observe_begin) * 1e3
    off = float(np.abs(state - own(environment, suite, task, actions)).max())
    expect(off < TOLERANCE, f"LIBERO's own environment ends elsewhere (by {off:g})")
    return {
        "family": FAMILY,
        "task": task.name,
        "repeats_exactly": True,
        "distance_from_libero": off,
        "step_ms": round(step_ms, 2),
        "observe_ms": round(observe_ms, 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def own(environment: LiberoEnvironment, suite: Any, task: Any, actions: np.ndarray) -> np.ndarray:
    """The state that LIBERO's own environment class ends in after the same episode."""
    from libero.libero.envs.env_wrapper import ControlEnv

    with contextlib.redirect_stdout(io.StringIO()):
        theirs: Any = ControlEnv(
            str(environment.bddl_file(task.name)), use_camera_obs=False, has_offscreen_renderer=False
        )
        theirs.seed(0)
        theirs.reset()
    model, ours = theirs.sim.model, environment.scene.model
    model.body_pos[:], model.body_quat[:] = ours.body_pos, ours.body_quat  # the fixtures' places, drawn at random
    theirs.set_init_state(environment.initial_states(task.name)[3])
    for action in [*np.tile(suite.settle_action, (suite.settle_steps, 1)), *actions]:
        theirs.step(action)
    return theirs.get_sim_state()


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"self-check: {otherwise}")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
