"""From a LIBERO task's goal to the skills that reach it: which, in which order, and where things go.

It reads geometry from the scene and holds no task's numbers. What it has no skill for is refused by name.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prts_core.io.errors import SimulatorError
from prts_core.sim.suites.libero.expert_carry import PickPlace
from prts_core.sim.suites.libero.expert_grasp import Grasp, level_pinch, pinch, rim
from prts_core.sim.suites.libero.expert_joints import Drag, Pull, Push, Turn, wish
from prts_core.sim.suites.libero.expert_motion import Skill
from prts_core.sim.suites.libero.expert_scene import ExpertScene

WIDEST = 0.072  # m, of what the fingers close around


def spoken(name: str) -> str:
    """`akita_black_bowl_1` as people say it."""
    words = [word for word in name.split("_") if not word.isdigit()]
    return " ".join(words).removeprefix("akita ").removeprefix("new ").removeprefix("glazed rim porcelain ")


# How things are held that no gripper spans: (inside the outer edge, below the top, no handle).
_RIM = {
    "akita_black_bowl": (0.0065, 0.016, True),
    "porcelain_mug": (0.004, 0.02, False),
    "white_yellow_mug": (0.004, 0.02, False),
    "red_coffee_mug": (0.004, 0.02, False),
}


_BEFORE = {"open": 0, "turnon": 0, "on": 1, "in": 1, "close": 2}  # what is to be shut is shut when all is inside
_FLAT = 0.03  # m, of what is dragged and not picked up


def skills_of(scene: ExpertScene) -> list[Skill]:
    """The skills for a goal, in the order in which they are done. SimulatorError where there is none for a part."""
    goal = [(str(predicate).lower(), *map(str, names)) for predicate, *names in scene.seen["goal"]]
    skills: list[Skill] = []
    for index, (predicate, *names) in sorted(enumerate(goal), key=lambda part: _BEFORE.get(part[1][0], 1)):
        found = _for(scene, goal, index) if predicate in _BEFORE else []
        if not found:
            raise SimulatorError(
                "The scripted expert has no skill for a task's goal",
                field="goal",
                found=" ".join((predicate, *names)),
                expected="things a hand can hold, put on or into something open; drawers, doors and knobs",
                cure="leave this task out; --task chooses",
            )
        skills += found
    return skills


def _for(scene: ExpertScene, goal: list[tuple[str, ...]], index: int) -> list[Skill]:
    """The skills of one part of a goal; none where it cannot be done."""
    predicate, *names = goal[index]
    if predicate in ("open", "close", "turnon"):
        return _moved(scene, predicate, names[0])
    name, target = names
    if name not in scene.seen["owners"] or target not in {*scene.seen["sites"], *scene.seen["owners"]}:
        return []
    low, high = scene.extent(name)
    if predicate == "on" and not _spans(scene, name) and high[2] - low[2] < _FLAT:
        hollow = scene.floor((low + high)[:2] / 2, name) < high[2] - 0.005
        goes = Drag(name, lambda now: now.position(target), (spoken(name), _aside(target)))
        return [goes] if hollow and parent_of(scene, target) is None else []
    if not _spans(scene, name):
        return []
    sharing = [one for one in range(len(goal)) if goal[one][0] == predicate and goal[one][-1] == target]
    rank = sharing.index(index) - (len(sharing) - 1) / 2
    joints = scene.seen.get("joints_of", {}).get(target) or []
    if predicate == "in" and joints:
        return [*_opened(scene, joints[0], target, name), into_drawer(scene, name, target, joints[0])]
    if predicate == "in" and "contain" not in target:
        return []
    return [_place(scene, name, target, rank * _apart(scene, predicate, name, target), len(sharing) > 1)]


def _apart(scene: ExpertScene, predicate: str, name: str, target: str) -> np.ndarray:
    """(3,) from one to the next of the things that share a place: corner to corner in what has walls, else in a row."""
    if target not in scene.seen["sites"]:
        return np.zeros(3)
    _, mat, half = scene.seen["sites"][target]
    if predicate == "on":
        return np.array([1.6 * float(half[0]), 0.0, 0.0])
    low, high = scene.extent(name)
    room = np.maximum(np.abs(mat @ half)[:2] - (high - low)[:2].mean() / 2, 0.015)
    return np.r_[2 * room, 0.0]


def parent_of(scene: ExpertScene, target: str) -> str | None:
    """The thing or fixture that a region belongs to; the thing itself; None for a place on a table."""
    return next((owner for owner in scene.seen["owners"] if target.startswith(owner)), None)


def _moved(scene: ExpertScene, predicate: str, target: str) -> list[Skill]:
    """A fixture, or the part of it that a region belongs to, open, shut or on."""
    fixture = parent_of(scene, target)
    joints = scene.seen.get("joints_of", {}).get(target) or []
    other = {"open": "close", "close": "open", "turnon": "turnoff"}[predicate]
    if fixture is None or not joints or not {predicate, other} <= scene.seen["ranges"][fixture].keys():
        return []
    if predicate == "close":
        return [Push(wish(scene, fixture, joint, predicate, other), _part(target, fixture)) for joint in joints]
    wanted = wish(scene, fixture, joints[0], predicate, other)
    if predicate == "turnon":
        return [Turn(wanted, f"{spoken(fixture)}'s knob")]
    return [Pull(wanted, _part(target, fixture))] if scene.seen["links"][joints[0]]["slides"] else []


def _opened(scene: ExpertScene, joint: str, region: str, name: str) -> list[Skill]:
    """What opens a drawer where it is not open: no further than a thing needs, since it then hangs over others."""
    fixture = parent_of(scene, region)
    assert fixture is not None
    wanted = wish(scene, fixture, joint, "open", "close")
    if wanted.holds(scene):
        return []
    low, high = scene.extent(name)
    enough = min(float((high - low)[:2].max()) + 0.025, abs(wanted.edge)) * wanted.sign
    return [Pull(replace(wanted, edge=0.75 * enough, enough=enough), _part(region, fixture))]


def _part(region: str, fixture: str) -> str:
    """`white_cabinet_1_bottom_region` as people say it."""
    if region == fixture:
        return f"{spoken(fixture)}'s door"
    return spoken(region.removeprefix(fixture).removesuffix("_region").strip("_")) + " drawer"


def _aside(region: str) -> str:
    """`main_table_stove_front_region` as people say it, without its table."""
    return "to the " + spoken(region.removesuffix("_region").partition("table_")[2] or region)


def _spans(scene: ExpertScene, name: str) -> bool:
    """Can the hand hold it?"""
    return name.rsplit("_", 1)[0] in _RIM or _narrow(scene, name) or level_pinch(scene, name, WIDEST) is not None


def _narrow(scene: ExpertScene, name: str) -> bool:
    return min(scene.width(name, yaw)[0] for yaw in np.linspace(0.0, np.pi, 24, endpoint=False)) < WIDEST


def _grasp(scene: ExpertScene, name: str, place: np.ndarray, failed: list[np.ndarray], tight: bool = False) -> Grasp:
    kind = name.rsplit("_", 1)[0]
    if kind in _RIM:
        inset, below, round_body = _RIM[kind]
        return rim(scene, name, inset, below, place, failed, round_body, tight)
    if not _narrow(scene, name):
        held = level_pinch(scene, name, WIDEST)
        if held is not None:
            return held
    return pinch(scene, name, 0.034, WIDEST)


def _place(scene: ExpertScene, name: str, target: str, apart: np.ndarray, crowded: bool) -> Skill:
    parent = parent_of(scene, target)
    inside = "contain" in target
    word = "into" if inside else "onto"

    def where(now: ExpertScene) -> np.ndarray:
        place = now.position(target) + apart
        if inside and parent is not None:
            return np.r_[place[:2], now.extent(parent)[0][2] + 0.02]
        if parent == target:
            return np.r_[place[:2], now.extent(target)[1][2]]
        support = now.support(place, name)
        return np.r_[place[:2], support if np.isfinite(support) else place[2]]

    slot = scene.seen["sites"][target][2] if inside else np.ones(3)
    oblong = max(slot[:2]) > 1.5 * min(slot[:2])
    return PickPlace(
        name,
        lambda now, failed: _grasp(now, name, where(now), failed),
        where,
        lambda now: now.position(name),
        0.04,
        (spoken(name), f"{word} the {spoken(parent or target)}"),
        hand_above=float(scene.extent(parent)[1][2]) if inside and parent is not None else -np.inf,
        within=0.06 if inside else 0.03,
        crowded=crowded,
        twist=(lambda now: _misfit(now, name, target)) if oblong else None,
    )


def _misfit(scene: ExpertScene, name: str, slot: str) -> float:
    """How far (rad) a thing has to turn until its narrow side lies along the narrow side of an oblong region."""
    yaws = np.arange(48) * np.pi / 48
    lying = float(yaws[int(np.argmin([scene.width(name, yaw)[0] for yaw in yaws]))])
    _, mat, half = scene.seen["sites"][slot]
    narrow = mat[:, int(np.argmin(half[:2]))]
    return float((np.arctan2(narrow[1], narrow[0]) - lying + np.pi / 2) % np.pi - np.pi / 2)


def into_drawer(scene: ExpertScene, name: str, region: str, joint: str) -> Skill:
    """A thing into an open drawer, where nothing is above."""
    fixture = parent_of(scene, region)
    assert fixture is not None
    low, high = scene.extent(name)
    radius = float((high - low)[:2].max()) / 2

    def where(now: ExpertScene) -> np.ndarray:
        return drawer_place(now, region, joint, name, radius)

    return PickPlace(
        name,
        lambda now, failed: _grasp(now, name, where(now), failed, tight=True),
        where,
        lambda now: now.position(name),
        0.04,
        (spoken(name), f"into the {_part(region, fixture)}"),
        hand_above=float(scene.moved_by(joint)[..., 2].max()),
        arrived=lambda now: now.within(region, now.position(name)),
        crowded=True,
    )


def drawer_place(scene: ExpertScene, region: str, joint: str, without: str, radius: float) -> np.ndarray:
    """(x, y, height of the floor) in an open drawer, nearest to its middle, with nothing above within `radius`."""
    middle, mat, half = scene.seen["sites"][region]
    reach = np.abs(mat @ half)[:2]
    wall = float(scene.moved_by(joint)[..., 2].max())
    steps = np.linspace(-1.0, 1.0, 9)
    places = [middle[:2] + reach * [x, y] for x in steps for y in steps]
    places.sort(key=lambda place: float(np.linalg.norm(place - middle[:2])))
    free = (place for place in places if scene.top_along(place, place, radius, without) < wall + 0.005)
    chosen = next(free, middle[:2])
    return np.r_[chosen, middle[2] - np.abs(mat @ half)[2]]
