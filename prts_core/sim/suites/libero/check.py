"""LIBERO's self-check, run in the simulator's own Python: `python -m prts_core.sim.suites.libero.check <home>`.

One line of JSON at the end says what was found; a failed check is an exit status and a sentence.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.sim.simulator_side import check_repeats, expect, report
from prts_core.sim.suites.libero.environment import LiberoEnvironment
from prts_core.sim.suites.libero.spec import suites_of

SUITE, STEPS, EPISODE, SEED = "libero_object", 20, 3, 7
TOLERANCE = 1e-9  # m, rad: of positions after some steps; LIBERO builds its scene anew, so the solver starts colder


def main(home: Path) -> dict[str, Any]:
    suite = suites_of(home / "tasks.json")[SUITE]
    environment = LiberoEnvironment(home)
    actions = np.random.default_rng(SEED).uniform(-1, 1, (STEPS, len(suite.contract.action)))
    state, _, found = check_repeats(environment, suite, EPISODE, SEED, actions)
    off = float(np.abs(state - own(environment, suite, suite.tasks[0], actions)).max())
    expect(off < TOLERANCE, f"LIBERO's own environment ends elsewhere (by {off:g})")
    return found | {"distance_from_libero": off}


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
    theirs.set_init_state(environment.initial_states(task.name)[EPISODE])
    for action in [*np.tile(suite.settle_action, (suite.settle_steps, 1)), *actions]:
        theirs.step(action)
    return theirs.get_sim_state()


if __name__ == "__main__":
    report(main)
