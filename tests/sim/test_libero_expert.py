"""The scripted expert of LIBERO on a hand and boxes that move without physics: what it does where things go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import SimulatorError
from prts_core.sim.suites.libero.expert import LiberoExpert
from prts_core.sim.suites.libero.expert_grasp import pinch, rim, turned
from prts_core.sim.suites.libero.expert_scene import NEUTRAL, ExpertScene

DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
SOUP, BASKET, WALL = "soup_1", "basket_1", "wall_1"


class World:
    """A hand that goes where it is told, 1.2 cm a step at most, and a soup that sticks to closed fingers around it."""

    def __init__(self, wall: bool = False) -> None:
        self.hand, self.yaw, self.opening = np.array([-0.15, 0.0, 0.25]), NEUTRAL, 0.08
        self.places = {SOUP: np.array([-0.1, -0.2, 0.03]), BASKET: np.array([0.0, 0.25, 0.0])}
        self.halves = {SOUP: np.array([0.03, 0.02, 0.03]), BASKET: np.array([0.08, 0.08, 0.005])}
        if wall:
            self.places[WALL], self.halves[WALL] = np.array([-0.1, -0.115, 0.06]), np.array([0.1, 0.01, 0.06])
        self.attached: np.ndarray | None = None

    def privileged(self) -> dict[str, Any]:
        names = list(self.places)
        out = self.opening / 2 * np.array([np.cos(self.yaw), np.sin(self.yaw), 0.0])
        return {
            "hand": self.hand.copy(),
            "hand_mat": DOWN,
            "base": np.array([-0.6, 0.0, 0.0]),
            "fingers": np.stack([self.hand - out, self.hand + out]),
            "objects": {name: (place.copy(), np.eye(3)) for name, place in self.places.items()},
            "sites": {"basket_1_contain_region": (self.places[BASKET] + [0, 0, 0.07], np.eye(3), np.full(3, 0.06))},
            "joints": {},
            "owners": names,
            "box_owner": np.arange(len(names)),
            "box_center": np.stack([self.places[name] for name in names]),
            "box_mat": np.stack([np.eye(3)] * len(names)),
            "box_half": np.stack([self.halves[name] for name in names]),
            "goal": [["in", SOUP, "basket_1_contain_region"]],
        }

    def step(self, action: np.ndarray) -> None:
        assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action).max() <= 1.0
        self.hand = self.hand + 0.012 * action[:3]
        self.yaw += 0.1 * float(action[5])
        soup = self.places[SOUP]
        around = np.abs(soup[:2] - self.hand[:2]).max() < 0.02 and abs(self.hand[2] - soup[2]) < 0.03
        if action[6] > 0:
            self.opening = max(self.opening - 0.02, 0.04 if around else 0.0)
            if around and self.opening <= 0.04 and self.attached is None:
                self.attached = soup - self.hand
        else:
            self.opening, self.attached = min(self.opening + 0.02, 0.08), None
        if self.attached is not None:
            self.places[SOUP] = self.hand + self.attached
        else:
            self.places[SOUP][2] = 0.03

    def solved(self) -> bool:
        off = np.abs(self.places[SOUP] - self.places[BASKET])
        return bool(off[:2].max() < 0.03 and self.attached is None)


def solve(world: World, steps: int = 250, disturb: Any = None) -> tuple[int, list[str]]:
    """(steps taken, phases in order of appearance, repeated where they come again)."""
    expert = LiberoExpert()
    phases: list[str] = []
    for step in range(steps):
        if world.solved():
            return step, phases
        world.step(expert.act(world))  # type: ignore[arg-type]
        if not phases or phases[-1] != expert.phase:
            phases.append(expert.phase)
        if disturb is not None:
            disturb(step, world, expert)
    pytest.fail(f"not solved in {steps} steps; phases {phases}")


def test_it_carries_the_soup_into_the_basket_and_says_so() -> None:
    steps, phases = solve(World())
    assert steps < 150
    assert phases == [
        "reach for the soup",
        "grasp the soup",
        "lift the soup",
        "carry the soup into the basket",
        "put the soup into the basket",
        "let go of the soup",
    ]


def test_a_pushed_soup_is_followed() -> None:
    pushed: list[str] = []

    def push(step: int, world: World, expert: LiberoExpert) -> None:
        if step == 15:
            world.places[SOUP][:2] += [0.08, -0.05]
            pushed.append(expert.phase)

    _, phases = solve(World(), disturb=push)
    assert pushed == ["reach for the soup"] and phases.count("grasp the soup") == 1


def test_a_dropped_soup_is_picked_up_again() -> None:
    dropped: list[int] = []

    def drop(step: int, world: World, expert: LiberoExpert) -> None:
        if expert.phase.startswith("carry") and not dropped:
            dropped.append(step)
            world.attached = None
            world.places[SOUP] = np.array([*world.hand[:2], 0.03])
            world.opening = 0.0

    _, phases = solve(World(), steps=400, disturb=drop)
    assert dropped and phases.count("grasp the soup") == 2


def test_a_soup_that_jumps_out_again_is_brought_back() -> None:
    jumped: list[int] = []

    def jump(step: int, world: World, expert: LiberoExpert) -> None:
        if expert.phase.startswith("let go") and world.attached is None and not jumped:
            jumped.append(step)
            world.places[SOUP] = np.array([-0.1, 0.0, 0.03])

    _, phases = solve(World(), steps=400, disturb=jump)
    assert jumped and phases.count("let go of the soup") == 2


def test_two_things_go_into_opposite_corners_of_one_basket() -> None:
    class Two(World):
        def __init__(self) -> None:
            super().__init__()
            self.places["tin_1"], self.halves["tin_1"] = np.array([0.1, -0.1, 0.03]), np.full(3, 0.02)
            self.soups = (SOUP, "tin_1")

        def privileged(self) -> dict[str, Any]:
            return super().privileged() | {"goal": [["in", name, "basket_1_contain_region"] for name in self.soups]}

    world, expert = Two(), LiberoExpert()
    for _ in range(140):
        world.step(expert.act(world))  # type: ignore[arg-type]
    assert expert.skills is not None
    first, second = (skill.where(ExpertScene(world.privileged()))[:2] for skill in expert.skills)  # type: ignore[attr-defined]
    assert (second - first > 0.07).all()  # corner to corner
    assert (np.abs(np.stack([first, second]) - world.places[BASKET][:2]) + 0.02 <= 0.06 + 1e-9).all()
    assert expert.skills[0].done(ExpertScene(world.privileged())) and "tin" in expert.phase


def test_shaken_actions_do_not_keep_it_from_the_goal() -> None:
    rng = np.random.default_rng(0)

    def shake(step: int, world: World, expert: LiberoExpert) -> None:
        world.hand += rng.normal(0, 0.003, 3) * (world.attached is None)

    _, phases = solve(World(), disturb=shake, steps=400)
    assert phases[-1] == "let go of the soup"


def test_a_pinch_goes_across_the_narrow_side_and_keeps_clear_of_a_wall() -> None:
    free = pinch(ExpertScene(World().privileged()), SOUP, 0.034, 0.072)
    assert abs(free.yaw - NEUTRAL) < 0.01 and np.allclose(free.position, [-0.1, -0.2, 0.03], atol=1e-6)
    scene = ExpertScene(World(wall=True).privileged())
    assert scene.blocked(free.position, free.yaw, SOUP) > 0.05
    beside = pinch(scene, SOUP, 0.034, 0.072)
    assert scene.blocked(beside.position, beside.yaw, SOUP) < 0.3 * scene.blocked(free.position, free.yaw, SOUP)


def test_a_rim_grasp_avoids_the_grip_that_failed() -> None:
    scene, place = ExpertScene(World().privileged()), np.array([0.0, 0.25, 0.0])
    first = rim(scene, SOUP, 0.006, 0.016, place)
    offset = first.position[:2] - scene.position(SOUP)[:2]
    second = rim(scene, SOUP, 0.006, 0.016, place, [offset])
    assert np.linalg.norm(second.position - first.position) > 0.015


def test_a_way_is_as_high_as_what_stands_on_it_and_not_as_what_is_behind() -> None:
    scene = ExpertScene(World(wall=True).privileged())
    start, end = np.array([-0.1, -0.2, 0.1]), np.array([0.0, 0.25, 0.1])
    assert scene.top_along(start, end, 0.05, SOUP) == pytest.approx(0.12)
    assert scene.top_along(np.array([-0.1, 0.0, 0.1]), end, 0.05, SOUP) == pytest.approx(0.005)


@pytest.mark.parametrize("goal", [["open", "drawer_1"], ["in", SOUP, "cabinet_1_top_region"], ["on", BASKET, SOUP]])
def test_a_goal_it_has_no_skill_for_is_refused(goal: list[str]) -> None:
    class Other(World):
        def privileged(self) -> dict[str, Any]:
            return super().privileged() | {"goal": [goal]}

    with pytest.raises(SimulatorError, match="no skill"):
        LiberoExpert().act(Other())  # type: ignore[arg-type]


def test_a_stretched_arm_is_noticed() -> None:
    scene = ExpertScene(World().privileged())
    assert scene.stretch(np.array([-0.1, 0.0, 0.2])) == 0.0
    assert scene.stretch(np.array([0.3, 0.2, 0.2])) > 0.1


def test_yaws_stay_within_a_half_turn_of_the_wrists_home() -> None:
    for angle in np.linspace(-10, 10, 41):
        assert abs(turned(angle) - NEUTRAL) <= np.pi / 2 + 1e-9
        assert np.isclose(np.sin(2 * (turned(angle) - angle)), 0.0, atol=1e-9)
