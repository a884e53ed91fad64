"""One episode of a suite's scripted expert, as the worker's answer to `demonstrate`.

The expert's clean action is the label; what the simulator gets is that action pushed off by noise, so that the expert
is recorded recovering. A push is held for some rows, else the arm's inertia swallows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from prts_core.sim.suite import Environment, Expert

PUSH_ROWS = 2


def run_expert(
    environment: Environment,
    expert: Expert,
    *,
    max_steps: int,
    tail_steps: int,
    noise: float,
    noise_seed: int,
    images: bool,
) -> dict[str, Any]:
    """Arrays of T rows; row t holds what was seen before action t.

    actions (T, A) clean labels, executed (T, A) what the simulator got, both float32; proprio (T, S); states (T, n);
    images {camera key: (T, H, W, 3)} or {}; phases: T names; rewards (T,) float32; success_row: where success was first
    reported, None where it never was within `max_steps`. Recording goes on for `tail_steps` rows after success.
    """
    rng = np.random.default_rng(noise_seed)
    weights = np.asarray(expert.noise_weights, np.float32)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("actions", "executed", "proprio", "states", "phases", "rewards")
    }
    pictures: dict[str, list[np.ndarray]] = {}
    success_row: int | None = None
    push = np.zeros_like(weights)
    row = 0
    while row < max_steps if success_row is None else row <= success_row + tail_steps:
        action = np.asarray(expert.act(environment), np.float32)
        if noise and row % PUSH_ROWS == 0:
            push = (rng.normal(0.0, noise, len(weights)) * weights).astype(np.float32)
        executed = np.clip(action + push, -1.0, 1.0).astype(np.float32)
        rows["proprio"].append(environment.proprioception())
        rows["states"].append(environment.state())
        if images:
            for key, picture in environment.images().items():
                pictures.setdefault(key, []).append(picture)
        reward, success = environment.step(executed)
        for name, value in (("actions", action), ("executed", executed), ("phases", expert.phase), ("rewards", reward)):
            rows[name].append(value)
        if success and success_row is None:
            success_row = row
        row += 1
    return {
        "actions": np.stack(rows["actions"]),
        "executed": np.stack(rows["executed"]),
        "proprio": np.stack(rows["proprio"]),
        "states": np.stack(rows["states"]),
        "images": {key: np.stack(seen) for key, seen in pictures.items()},
        "phases": rows["phases"],
        "rewards": np.asarray(rows["rewards"], np.float32),
        "success_row": success_row,
    }
