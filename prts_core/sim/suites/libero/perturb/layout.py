"""LIBERO-Plus, object layout: things that were not there, or the task's object begun elsewhere. It knows no worker.

Definition: LIBERO-Plus's two kinds (`_add_N`; `_levelK_sampleJ`). Ours: which objects and where. LIBERO-Plus adds 416
objects of its own; here they are LIBERO's, one a level. A moved object is shifted by 2 cm a level to where there is
room. Everything else begins exactly as the stored initial state says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.errors import ConfigError
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero.perturb.draws import draw, levelled

KINDS = ("add", "move")
SHIFT_M = 0.02  # a level
DISTRACTORS = (
    "cookies", "cream_cheese", "butter", "chocolate_pudding", "ketchup", "milk", "orange_juice", "tomato_sauce",
    "alphabet_soup", "porcelain_mug", "red_coffee_mug", "white_yellow_mug",
)  # fmt: skip
REGION = "distractor_region"
ROOM = (-0.25, -0.32, 0.2, 0.32)  # m around the middle of the workspace: x and y from, x and y to
CLEARANCE_M, TRIES, DIRECTIONS = 0.015, 400, 32


def rewrite(problem: Problem, settings: Mapping[str, Any], task: str) -> list[str]:
    """Put distractors into the description; their names. None for the other kind."""
    kind, level, seed = levelled("layout", settings, KINDS)
    if kind != "add":
        return []
    categories = set(problem.objects.values())
    choice = [name for name in DISTRACTORS if name not in categories]
    chosen = draw("layout", kind, level, seed, task).permutation(choice)[:level]
    top = problem.workspace()
    ranges = [":ranges", [[f"{value:g}" for value in ROOM]]]
    problem.section(":regions").append([REGION, [":target", top], ranges])
    names = [f"{category}_9" for category in chosen]
    for name, category in zip(names, chosen, strict=True):
        problem.section(":objects").extend([name, "-", str(category)])
        problem.section(":init").append(["on", name, f"{top}_{REGION}"])
    return names


def arrange(scene: Any, settings: Mapping[str, Any], task: str, problem: Problem, added: list[str]) -> None:
    """Place what is added, or shift what is moved, in the scene's state of the moment. ConfigError where none can be.

    problem: the task's own description. added: the names of `rewrite`.
    """
    kind, level, seed = levelled("layout", settings, KINDS)
    rng = draw("layout places", kind, level, seed, task)
    if kind == "add":
        others = {name: disc for name, disc in _discs(scene).items() if name not in added}
        for name in added:
            others[name] = _put_anywhere(scene, name, others, rng)
        return
    target = moved(problem)
    middle, radius = _discs(scene)[target]
    others = {name: disc for name, disc in _discs(scene).items() if name != target}
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + np.linspace(0, 2 * np.pi, DIRECTIONS, endpoint=False)
    places = [middle + SHIFT_M * level * np.array([np.cos(a), np.sin(a)]) for a in angles]
    _set(scene, target, _first_free(places, radius, others))


def moved(problem: Problem) -> str:
    """The object that the kind `move` moves: of interest and lying free, else any that lies free."""
    free = problem.lying()
    wanted = [name for name in problem.section(":obj_of_interest")[1:] if name in free] or list(free)
    if not wanted:
        raise ConfigError("Nothing in this task lies free to be moved", field="layout", found=str(problem.file))
    return wanted[0]


def _discs(scene: Any) -> dict[str, tuple[np.ndarray, float]]:
    """{object or fixture: (middle (2,), radius)} in metres."""
    env = scene.env
    return {
        name: (np.array(env.sim.data.body_xpos[body][:2]), float(getattr(env.get_object(name), "horizontal_radius", 0)))
        for name, body in env.obj_body_id.items()
    }


def _put_anywhere(scene: Any, name: str, others: Any, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    radius = _discs(scene)[name][1]
    offset = np.asarray(scene.env.workspace_offset[:2], np.float64)
    places = offset + rng.uniform(ROOM[:2], ROOM[2:], (TRIES, 2))
    place = _first_free(list(places), radius, others)
    _set(scene, name, place)
    return place, radius


def _first_free(places: list[np.ndarray], radius: float, others: Any) -> np.ndarray:
    """The first place that keeps clear of everything, else the one that comes nearest to it."""

    def room(place: np.ndarray) -> float:
        return min((float(np.linalg.norm(place - m)) - r - radius for m, r in others.values()), default=np.inf)

    free = next((place for place in places if room(place) >= CLEARANCE_M), None)
    return max(places, key=room) if free is None else free


def _set(scene: Any, name: str, place: np.ndarray) -> None:
    joint = scene.model.joint(scene.env.get_object(name).joints[0])
    start = int(joint.qposadr[0])
    scene.data.qpos[start : start + 2] = place
