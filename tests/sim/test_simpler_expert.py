"""SimplerEnv's scripted expert on a hand that goes where it is told: it works, and a wrong convention shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import SimulatorError
from prts_core.sim.suites.simpler.environment import POINTING_DOWN, matrix_of
from prts_core.sim.suites.simpler.expert import GRIPS, SimplerExpert, across, expert, yaw_across
from prts_core.sim.suites.simpler.spec import TASKS, suites_of

CARROT = "widowx_carrot_on_plate"
TILTED = matrix_of(np.array([0.0, 0.3, 0.2])) @ POINTING_DOWN  # the hand begins askew


def as_it_is(action: np.ndarray) -> np.ndarray:
    return action


class World:
    """A carrot that sticks to fingers closed across it, a plate, a hand that is where its controller wants it."""

    def __init__(self, wrong: Callable[[np.ndarray], np.ndarray] = as_it_is) -> None:
        self.wrong = wrong
        self.hand, self.turn, self.opening = np.array([0.3, 0.0, 0.15]), TILTED, 1.0
        self.carrot, self.lies = np.array([0.28, 0.1, 0.02]), matrix_of(np.array([0.0, 0.0, 1.1]))
        self.plate = np.array([0.33, -0.08, 0.003])
        self.attached: np.ndarray | None = None

    def privileged(self) -> dict[str, Any]:
        hand = (self.hand.copy(), self.turn)
        return {
            "goal": hand,
            "hand": hand,
            "opening": self.opening,
            "carried": (self.carrot.copy(), self.lies),
            "target": (self.plate, np.eye(3)),
        }

    def step(self, action: np.ndarray) -> None:
        assert action.shape == (7,) and action.dtype == np.float32
        assert np.linalg.norm(action[:3]) < 0.041 and np.abs(action[3:6]).max() < 0.31 and 0 <= action[6] <= 1
        action = self.wrong(action.astype(np.float64))
        self.hand = self.hand + action[:3]
        self.turn = matrix_of(action[3:6]) @ self.turn
        if action[6] > 0.5:
            self.opening, self.attached = 1.0, None
        else:
            self.opening = max(self.opening - 0.5, 0.2)
            fits = abs(self.turn[:, 1] @ self.lies[:, 1]) > 0.97 and self.turn[2, 0] < -0.97
            if fits and np.linalg.norm(self.carrot - self.hand) < 0.02 and self.attached is None:
                self.attached = self.carrot - self.hand
        if self.attached is not None:
            self.carrot = self.hand + self.attached
        else:
            self.carrot[2] = 0.02

    def solved(self) -> bool:
        return bool(np.linalg.norm((self.carrot - self.plate)[:2]) < 0.03 and self.attached is None)


def episode(world: World, disturb: Callable[[int, World], None] = lambda step, world: None) -> list[str]:
    """The phases of 60 steps, in order of appearance."""
    acting = SimplerExpert(GRIPS[CARROT])
    phases: list[str] = []
    for step in range(60):
        disturb(step, world)
        world.step(acting.act(world))  # type: ignore[arg-type]
        if not phases or phases[-1] != acting.phase:
            phases.append(acting.phase)
    return phases


def test_it_carries_the_carrot_to_the_plate_and_says_so() -> None:
    world = World()
    phases = episode(world)
    assert world.solved() and phases[0] == "reach for the carrot" and phases[-1] == "let go of the carrot"
    assert phases.index("grasp the carrot") < phases.index("carry the carrot onto the plate")
    assert world.hand[2] > world.carrot[2] + 0.05, "the hand has gone up and away"


def test_a_dropped_carrot_is_picked_up_again() -> None:
    def drop(step: int, world: World) -> None:
        if step == 18:
            assert world.attached is not None
            world.attached, world.carrot = None, np.array([0.3, 0.05, 0.02])

    world = World()
    phases = episode(world, drop)
    assert world.solved() and phases.count("grasp the carrot") == 2


def changed(**columns: Any) -> Callable[[np.ndarray], np.ndarray]:
    def wrong(action: np.ndarray) -> np.ndarray:
        out = action.copy()
        for name, change in columns.items():
            where = slice(3, 6) if name == "turn" else slice(0, 3) if name == "move" else 6
            out[where] = change(action[where])
        return out

    return wrong


@pytest.mark.parametrize(
    "wrong",
    [
        changed(gripper=lambda value: 1.0 - value),
        changed(turn=lambda rpy: -rpy),
        changed(turn=lambda rpy: rpy[::-1]),
        changed(turn=np.rad2deg),
        changed(move=lambda xyz: [-xyz[0], -xyz[1], xyz[2]]),
        changed(move=lambda xyz: 100 * xyz),
    ],
    ids=["gripper", "turn reversed", "yaw first", "degrees", "the world's axes", "centimetres"],
)
def test_a_wrong_convention_is_a_failure(wrong: Callable[[np.ndarray], np.ndarray]) -> None:
    world = World(wrong)
    episode(world)
    assert not world.solved()


def test_fingers_close_along_a_lying_things_narrow_side() -> None:
    for angle in np.linspace(-4.0, 4.0, 33):
        turn = matrix_of(np.array([0.0, 0.0, angle]))
        yaw = yaw_across(turn)
        assert abs(yaw) <= np.pi / 2 + 1e-9 and abs(across(yaw) @ turn[:, 1]) == pytest.approx(1.0)
        hand = matrix_of(np.array([0.0, 0.0, yaw])) @ POINTING_DOWN
        assert np.allclose(hand[:, 1], across(yaw)) and np.allclose(hand[:, 0], [0.0, 0.0, -1.0])


def test_there_is_one_for_every_task_it_names_and_no_other() -> None:
    spec = suites_of({})["simpler_widowx"]
    for task in spec.tasks:
        if task.name in GRIPS:
            assert expert(spec, task).act(World()).shape == (7,)  # type: ignore[arg-type]
        else:
            with pytest.raises(SimulatorError, match="no scripted expert"):
                expert(spec, task)
    assert set(GRIPS) < set(TASKS)
