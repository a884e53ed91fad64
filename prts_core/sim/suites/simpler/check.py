"""SimplerEnv's self-check, run in the simulator's own Python: `python -m prts_core.sim.suites.simpler.check <home>`.

One line of JSON at the end says what was found; a failed check is an exit status and a sentence.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.sim.suites.simpler.assets import unavailable
from prts_core.sim.suites.simpler.environment import (
    VIEW,
    Scene,
    SimplerEnvironment,
    controller_angles,
    import_simulator,
)
from prts_core.sim.suites.simpler.spec import CAMERA, FAMILY, SEED, SUITE, suites_of

STEPS, EPISODE = 6, 3


def main(home: Path) -> dict[str, Any]:
    suite = suites_of({"unavailable": unavailable(home / "assets")})[SUITE]
    task, other = suite.tasks[:2]
    import_simulator(home)
    environment = SimplerEnvironment(home)
    rng = np.random.default_rng(SEED)
    moves = rng.uniform(-1, 1, (STEPS, 7)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0]

    def episode() -> tuple[np.ndarray, np.ndarray]:
        environment.reset(suite, task, EPISODE, SEED)
        for action in moves:
            environment.step(action)
        return environment.state(), environment.images()[CAMERA]

    begin = time.perf_counter()
    try:
        state, picture = episode()
    except RuntimeError as err:  # Vulkan's words say enough, its traceback nothing
        raise SystemExit(f"self-check: ManiSkill builds no scene: {err}") from err
    environment.reset(suite, other, 0, SEED)
    for action in moves:
        environment.step(action)
    again, same = episode()
    expect(np.array_equal(state, again), f"an episode run twice ends elsewhere (by {np.abs(state - again).max():g})")
    expect(np.array_equal(picture, same), "an episode run twice does not look the same")
    expect(float(picture.std()) > 10, "the camera sees nothing")
    step_begin = time.perf_counter()
    for action in moves:
        environment.step(action)
    step_ms = (time.perf_counter() - step_begin) / STEPS * 1e3
    observe_begin = time.perf_counter()
    environment.images()
    observe_ms = (time.perf_counter() - observe_begin) * 1e3
    theirs, seen = own(task.name, moves)
    expect(np.array_equal(state, theirs), f"ManiSkill's own loop ends elsewhere (by {np.abs(state - theirs).max():g})")
    expect(np.array_equal(picture, seen), "ManiSkill's own loop sees something else")
    return {
        "family": FAMILY,
        "task": task.name,
        "repeats_exactly": True,
        "step_ms": round(step_ms, 2),
        "observe_ms": round(observe_ms, 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def own(task: str, moves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """State and picture that ManiSkill's own loop ends in after the same episode, drawing at every step."""
    env = Scene(task).env
    del env.get_obs  # its own again
    env.reset(seed=SEED, options={"episode_id": EPISODE})
    for x, y, z, *angles, gripper in moves:
        action = np.array([x, y, z, *controller_angles(np.array(angles)), 1.0 if gripper > 0.5 else -1.0], np.float32)
        seen = env.step(action)[0]
    return env.get_state()[0].numpy().astype(np.float64), seen["sensor_data"][VIEW]["rgb"][0].numpy()


def expect(true: bool, otherwise: str) -> None:
    if not true:
        raise SystemExit(f"self-check: {otherwise}")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
