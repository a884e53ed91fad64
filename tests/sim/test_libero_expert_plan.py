"""From LIBERO's goals to skills, and the skills that move fixtures, on a hand and boxes that move without physics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import SimulatorError
from prts_core.sim.suites.libero.expert import LiberoExpert
from prts_core.sim.suites.libero.expert_grasp import level_pinch
from prts_core.sim.suites.libero.expert_joints import Pull, wish
from prts_core.sim.suites.libero.expert_plan import drawer_place, skills_of
from prts_core.sim.suites.libero.expert_scene import ExpertScene

CABINET, STOVE, DRAWER, KNOB = "wooden_cabinet_1", "flat_stove_1", "wooden_cabinet_1_top_level", "flat_stove_1_button"
TOP, SIDE, BURNER = "wooden_cabinet_1_top_region", "wooden_cabinet_1_top_side", "flat_stove_1_cook_region"
BOWL, CHEESE, DISH, POT = "akita_black_bowl_1", "cream_cheese_1", "plate_1", "moka_pot_1"
RANGES = {
    CABINET: {"open": (-0.16, -0.14), "close": (0.0, 0.005)},
    STOVE: {"turnon": (0.5, 2.1), "turnoff": (-0.005, 0.0)},
}


class Kitchen:
    """A drawer that opens towards +y and hangs over the table, a knob, and what a hand takes; the hand goes and turns
    where it is told. What it has closed on follows it, and what it leans on with closed fingers gives way."""

    def __init__(self, goal: list[list[str]], drawer: float = 0.0) -> None:
        self.goal, self.drawer, self.knob = goal, drawer, 0.0
        self.hand, self.opening, self.held = np.array([-0.2, 0.0, 0.3]), 0.08, ""
        self.turned = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # opening, across, approach

    def boxes(self) -> list[tuple[str, list[float], list[float], float]]:
        """(owner, middle, half size, yaw)."""
        out = -self.drawer
        return [
            (CABINET, [0.0, -0.3, 0.1], [0.12, 0.09, 0.1], 0.0),
            (CABINET, [0.0, -0.205 + out, 0.15], [0.1, 0.005, 0.03], 0.0),  # rows 1 to 3 are the drawer's
            (CABINET, [0.0, -0.29 + out, 0.12], [0.1, 0.08, 0.003], 0.0),
            (CABINET, [0.0, -0.17 + out, 0.15], [0.04, 0.008, 0.008], 0.0),
            (STOVE, [-0.25, 0.2, 0.01], [0.04, 0.04, 0.01], 0.0),
            (STOVE, [-0.25, 0.2, 0.035], [0.04, 0.01, 0.015], self.knob),  # row 5 is the knob's bar
            (BOWL, [-0.1, 0.1, 0.025], [0.05, 0.05, 0.025], 0.0),
            (CHEESE, [0.1, 0.2, 0.02], [0.04, 0.02, 0.02], 0.0),
            (DISH, [0.2, 0.0, 0.003], [0.03, 0.03, 0.003], 0.0),
            *((DISH, [0.2 + x, y, 0.01], [0.02, 0.02, 0.01], 0.0) for x, y in ((0.05, 0), (-0.05, 0), (0, 0.05))),
            (POT, [-0.1, 0.3, 0.06], [0.045, 0.045, 0.06], 0.0),
            (POT, [-0.1, 0.3, 0.13], [0.006, 0.006, 0.01], 0.0),
        ]

    def privileged(self) -> dict[str, Any]:
        boxes = self.boxes()
        owners = list(dict.fromkeys(name for name, *_ in boxes))
        mats = [[[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]] for *_, yaw in boxes]
        places = {owner: next(np.array(middle) for name, middle, *_ in boxes if name == owner) for owner in owners}
        out = self.opening / 2 * self.turned[:, 0]
        return {
            "hand": self.hand.copy(),
            "hand_mat": self.turned.copy(),
            "base": np.array([-0.6, 0.0, 0.0]),
            "fingers": np.stack([self.hand - out, self.hand + out]),
            "objects": {name: (place, np.eye(3)) for name, place in places.items()},
            "sites": {
                TOP: (np.array([0.0, -0.29 - self.drawer, 0.15]), np.eye(3), np.array([0.09, 0.08, 0.03])),
                SIDE: (np.array([0.0, -0.3, 0.2]), np.eye(3), np.array([0.1, 0.08, 0.001])),
                BURNER: (np.array([-0.25, 0.4, 0.02]), np.eye(3), np.array([0.07, 0.07, 0.002])),
                "table_stove_front_region": (np.array([0.1, 0.3, 0.0]), np.eye(3), np.array([0.04, 0.04, 0.007])),
            },
            "joints": {DRAWER: self.drawer, KNOB: self.knob},
            "links": {
                DRAWER: {
                    "slides": True,
                    "axis": np.array([0.0, -1.0, 0.0]),
                    "anchor": np.zeros(3),
                    "value": self.drawer,
                    "boxes": np.array([1, 2, 3]),
                },
                KNOB: {
                    "slides": False,
                    "axis": np.array([0.0, 0.0, 1.0]),
                    "anchor": np.array([-0.25, 0.2, 0.0]),
                    "value": self.knob,
                    "boxes": np.array([5]),
                },
            },
            "joints_of": {CABINET: [DRAWER], STOVE: [KNOB], TOP: [DRAWER], SIDE: []},
            "ranges": RANGES,
            "owners": owners,
            "box_owner": np.array([owners.index(name) for name, *_ in boxes]),
            "box_center": np.array([middle for _, middle, *_ in boxes]),
            "box_mat": np.array(mats),
            "box_half": np.array([half for *_, half, _ in boxes]),
            "goal": self.goal,
        }

    def step(self, action: np.ndarray) -> None:
        assert action.shape == (7,) and action.dtype == np.float32 and np.abs(action).max() <= 1.0
        before = self.hand.copy()
        self.hand = self.hand + 0.012 * action[:3]
        turn = 0.1 * action[3:6].astype(float)
        angle = max(float(np.linalg.norm(turn)), 1e-9)
        x, y, z = turn / angle
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        self.turned = (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross) @ self.turned
        bar = np.array([0.0, -0.17 - self.drawer, 0.15])
        if action[6] < 0:
            self.opening, self.held = min(self.opening + 0.02, 0.08), ""
        else:
            near = {DRAWER: bar, KNOB: np.array([-0.25, 0.2, 0.035])}
            around = next((name for name, at in near.items() if np.linalg.norm(self.hand - at) < 0.02), "")
            if self.opening > 0.03 and around:
                self.held = around
            self.opening = max(self.opening - 0.02, 0.016 if self.held else 0.002)
        if self.held == DRAWER:
            self.drawer = float(np.clip(self.drawer - (self.hand - before)[1], -0.16, 0.01))
        elif self.held == KNOB:
            self.knob += turn[2]
        elif self.opening < 0.01 and np.abs(self.hand - bar)[[0, 2]].max() < 0.03 and self.hand[1] < bar[1] + 0.008:
            self.drawer = float(np.clip(-(self.hand[1] - 0.008 + 0.17), self.drawer, 0.01))


OVEN, HINGE = "microwave_1", "microwave_1_microjoint"


class Oven(Kitchen):
    """A door that stands open, with a handle on its outside, and gives way to closed fingers that lean on it."""

    anchor = np.array([0.0, 0.25, 0.1])

    def __init__(self) -> None:
        super().__init__([["close", OVEN]])
        self.door = -1.5

    def turn(self) -> np.ndarray:
        c, s = np.cos(self.door), np.sin(self.door)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])

    def boxes(self) -> list[tuple[str, list[float], list[float], float]]:
        parts = (([0.12, 0.0, 0.0], [0.12, 0.012, 0.09]), ([0.22, -0.05, 0.0], [0.01, 0.01, 0.06]))
        door = [(OVEN, list(self.anchor + self.turn() @ middle), half, self.door) for middle, half in parts]
        return [*super().boxes()[:6], *door]

    def privileged(self) -> dict[str, Any]:
        seen = super().privileged()
        hinge = {"slides": False, "axis": np.array([0.0, 0.0, 1.0]), "anchor": self.anchor, "value": self.door}
        seen["links"][HINGE] = hinge | {"boxes": np.array([6, 7])}
        seen["joints_of"] = {OVEN: [HINGE]}
        seen["ranges"] = {OVEN: {"open": (-2.094, -1.3), "close": (-0.005, 0.0)}}
        return seen

    def step(self, action: np.ndarray) -> None:
        super().step(action)
        out, over, up = self.turn().T @ (self.hand - self.anchor)
        if self.opening < 0.01 and 0.16 < out < 0.28 and -0.06 < over < 0.03 and abs(up) < 0.08:
            self.door = min(self.door + (over + 0.06) / out, 0.0)


def plan(*goal: list[str], drawer: float = 0.0) -> list[str]:
    skills = skills_of(ExpertScene(Kitchen(list(goal), drawer).privileged()))
    return [f"{type(skill).__name__} {getattr(skill, 'name', '')}".strip() for skill in skills]


def test_a_plan_opens_first_and_shuts_last_whatever_the_goals_order() -> None:
    assert plan(["open", TOP]) == ["Pull"]
    assert plan(["Close", TOP], ["In", BOWL, TOP], drawer=-0.15) == [f"PickPlace {BOWL}", "Push"]
    assert plan(["on", POT, BURNER], ["turnon", STOVE]) == ["Turn", f"PickPlace {POT}"]
    assert plan(["on", BOWL, SIDE]) == [f"PickPlace {BOWL}"]
    assert plan(["on", DISH, "table_stove_front_region"]) == [f"Drag {DISH}"]


def test_a_closed_drawer_is_opened_first_and_only_as_far_as_the_thing_needs() -> None:
    assert plan(["in", CHEESE, TOP], drawer=-0.15) == [f"PickPlace {CHEESE}"]
    assert plan(["in", CHEESE, TOP]) == ["Pull", f"PickPlace {CHEESE}"]
    first = skills_of(ExpertScene(Kitchen([["in", CHEESE, TOP]]).privileged()))[0]
    assert isinstance(first, Pull) and first.wish.enough == pytest.approx(-(0.08 + 0.025))


@pytest.mark.parametrize(
    "goal", [["open", STOVE], ["turnon", CABINET], ["open", SIDE], ["in", BOWL, SIDE], ["up", BOWL]]
)
def test_what_has_no_such_joint_or_region_is_refused(goal: list[str]) -> None:
    with pytest.raises(SimulatorError, match="no skill"):
        plan(goal)


def test_a_wish_lies_past_the_end_that_is_nearer_to_where_the_joint_comes_from() -> None:
    scene = ExpertScene(Kitchen([]).privileged())
    opened = wish(scene, CABINET, DRAWER, "open", "close")
    assert (opened.edge, opened.sign) == (-0.14, -1.0) and not opened.holds(scene)
    shut = wish(scene, CABINET, DRAWER, "close", "open")
    assert (shut.edge, shut.sign) == (0.0, 1.0) and shut.holds(ExpertScene(Kitchen([], drawer=0.001).privileged()))
    on = wish(scene, STOVE, KNOB, "turnon", "turnoff")
    assert (on.edge, on.sign) == (0.5, 1.0) and on.left(scene) > 0.5


@pytest.mark.parametrize(
    ("goal", "drawer", "words"),
    [
        (["open", TOP], 0.0, ["reach for the top drawer", "grasp the top drawer", "pull the top drawer open"]),
        (["close", TOP], -0.15, ["reach for the top drawer", "push the top drawer shut"]),
        (["turnon", STOVE], 0.0, [f"{verb} the flat stove's knob" for verb in ("reach for", "grasp", "turn")]),
    ],
)
def test_a_fixture_is_brought_into_its_range(goal: list[str], drawer: float, words: list[str]) -> None:
    kitchen, expert, phases = Kitchen([goal], drawer), LiberoExpert(), []
    skill = skills_of(ExpertScene(kitchen.privileged()))[0]
    for _ in range(250):
        if skill.wish.holds(ExpertScene(kitchen.privileged())):  # type: ignore[attr-defined]
            break
        kitchen.step(expert.act(kitchen))  # type: ignore[arg-type]
        if not phases or phases[-1] != expert.phase:
            phases.append(expert.phase)
    assert phases == words and skill.wish.holds(ExpertScene(kitchen.privileged()))  # type: ignore[attr-defined]


def test_a_door_is_followed_along_its_arc_until_it_is_shut() -> None:
    oven, expert = Oven(), LiberoExpert()
    for _ in range(200):
        oven.step(expert.act(oven))  # type: ignore[arg-type]
        if oven.door > -0.005:
            break
    assert oven.door > -0.005 and expert.phase == "push the microwave's door shut"


def test_a_drawer_is_let_go_of_and_left_before_what_comes_next() -> None:
    kitchen, expert = Kitchen([["in", CHEESE, TOP]]), LiberoExpert()
    for _ in range(250):
        kitchen.step(expert.act(kitchen))  # type: ignore[arg-type]
        if expert.phase.startswith("reach for the cream cheese"):
            break
    assert -0.125 < kitchen.drawer < -0.1 and not kitchen.held
    assert np.linalg.norm(kitchen.hand - [0.0, -0.17 - kitchen.drawer, 0.15]) > 0.07


def test_a_place_in_a_drawer_is_where_nothing_is_above() -> None:
    scene = ExpertScene(Kitchen([], drawer=-0.15).privileged())
    place = drawer_place(scene, TOP, DRAWER, CHEESE, 0.04)
    assert place[1] > -0.21 + 0.04 and place[2] == pytest.approx(0.12)
    assert drawer_place(ExpertScene(Kitchen([]).privileged()), TOP, DRAWER, CHEESE, 0.04)[1] == pytest.approx(-0.29)


def test_a_thing_too_wide_is_held_by_what_stands_out_at_its_top() -> None:
    grasp = level_pinch(ExpertScene(Kitchen([]).privileged()), POT, 0.072)
    assert grasp is not None and np.allclose(grasp.position[:2], [-0.1, 0.3], atol=1e-6)
    assert grasp.position[2] > 0.12
    assert level_pinch(ExpertScene(Kitchen([]).privileged()), BOWL, 0.072) is None
