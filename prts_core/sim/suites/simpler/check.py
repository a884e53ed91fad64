"""SimplerEnv's self-check, run in the simulator's own Python: `python -m prts_core.sim.suites.simpler.check <home>`.

One line of JSON at the end says what was found; a failed check is an exit status and a sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from prts_core.sim.simulator_side import check_repeats, expect, report
from prts_core.sim.suites.simpler.assets import unavailable
from prts_core.sim.suites.simpler.environment import (
    VIEW,
    Scene,
    SimplerEnvironment,
    controller_angles,
    import_simulator,
)
from prts_core.sim.suites.simpler.spec import CAMERA, SEED, SUITE, suites_of

STEPS, EPISODE = 6, 3


def main(home: Path) -> dict[str, Any]:
    suite = suites_of({"unavailable": unavailable(home / "assets")})[SUITE]
    import_simulator(home)
    rng = np.random.default_rng(SEED)
    moves = rng.uniform(-1, 1, (STEPS, 7)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0]
    try:
        state, pictures, found = check_repeats(SimplerEnvironment(home), suite, EPISODE, SEED, moves)
    except RuntimeError as err:  # Vulkan's words say enough, its traceback nothing
        raise SystemExit(f"self-check: ManiSkill builds no scene: {err}") from err
    theirs, seen = own(suite.tasks[0].name, moves)
    expect(np.array_equal(state, theirs), f"ManiSkill's own loop ends elsewhere (by {np.abs(state - theirs).max():g})")
    expect(np.array_equal(pictures[CAMERA], seen), "ManiSkill's own loop sees something else")
    return found


def own(task: str, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """State and picture that ManiSkill's own loop ends in after the same episode, drawing at every step."""
    env = Scene(task).env
    del env.get_obs  # its own again
    env.reset(seed=SEED, options={"episode_id": EPISODE})
    for x, y, z, *angles, gripper in moves:
        action = np.array([x, y, z, *controller_angles(np.array(angles)), 1.0 if gripper > 0.5 else -1.0], np.float32)
        seen = env.step(action)[0]
    return env.get_state()[0].numpy().astype(np.float64), seen["sensor_data"][VIEW]["rgb"][0].numpy()


if __name__ == "__main__":
    report(main)
