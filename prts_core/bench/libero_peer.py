"""Run LIBERO's own environment as a peer, in its own Python: answer each line on standard input with one of JSON.

This is the loop that evaluation scripts run: `env.step(action)` with the pictures of both cameras after every step,
built as LIBERO builds it.

usage: python libero_peer.py <bddl file> <actions.npy (T, 7)> <first state .npy> <pixels>
"""

import contextlib
import json
import sys
import time

import numpy as np


def main(bddl: str, actions_file: str, state_file: str, pixels: int) -> None:
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        from libero.libero.envs import OffScreenRenderEnv

        env = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=pixels, camera_widths=pixels)
        env.seed(0)
        actions, state = np.load(actions_file), np.load(state_file)
        for _ in sys.stdin:
            env.reset()
            env.set_init_state(state)
            begin = time.perf_counter()
            for action in actions:
                env.step(action)
            print(json.dumps({"seconds": time.perf_counter() - begin}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
