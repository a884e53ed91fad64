"""LIBERO-Plus, object layout: things that were not there, or the task's object begun elsewhere.

Definition: LIBERO-Plus's two kinds (`_add_N`; `_levelK_sampleJ`). Ours: which objects and where. LIBERO-Plus adds 416
objects of its own; here they are LIBERO's, one a level. A moved object is shifted by 2 cm a level to where there is
room. Everything else begins exactly as the stored initial state says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero.perturb.draws import draw, levelled

KINDS = ("add", "move")
SHIFT_M = 0.02  # a level
DISTRACTORS = (
    "cookies",
    "cream_cheese",
    "butter",
    "chocolate_pudding",
    "ketchup",
    "milk",
    "orange_juice",
    "tomato_sauce",
    "alphabet_soup",
    "porcelain_mug",
    "red_coffee_mug",
    "white_yellow_mug",
)
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
        placed: list[str] = []
        for name in added:
            room = np.asarray(scene.env.workspace_offset[:2]) + rng.uniform(ROOM[:2], ROOM[2:], (TRIES, 2))
            absent = {one for one in added if one not in placed}
            _set(scene, name, _first_free(list(room), _radius(scene, name), occupied(scene, absent)))
            placed.append(name)
        return
    target = moved(problem)
    middle = np.array(scene.data.body(scene.env.obj_body_id[target]).xpos[:2])
    turn = rng.uniform(0, 2 * np.pi)
    angles = turn + np.linspace(0, 2 * np.pi, DIRECTIONS, endpoint=False)
    places = [middle + SHIFT_M * level * np.array([np.cos(a), np.sin(a)]) for a in angles]
    _set(scene, target, _first_free(places, _radius(scene, target), occupied(scene, {target})))


def moved(problem: Problem) -> str:
    """The object that the kind `move` moves: of interest and lying free, else any that lies free."""
    free = problem.lying()
    wanted = [name for name in problem.section(":obj_of_interest")[1:] if name in free] or list(free)
    if not wanted:
        raise ConfigError("Nothing in this task lies free to be moved", field="layout", found=str(problem.file))
    return wanted[0]


def occupied(scene: Any, without: set[str]) -> np.ndarray:
    """(N, 4) from x, y to x, y: what the colliding shapes of objects and fixtures cover of the ground, in metres."""
    model, data = scene.model, scene.data
    owners = owners_of(scene)
    boxes = []
    for geom in range(model.ngeom):
        owner = owners.get(int(model.geom_bodyid[geom]))
        if owner is None or owner in without or not (model.geom_contype[geom] or model.geom_conaffinity[geom]):
            continue
        turned = data.geom_xmat[geom].reshape(3, 3)
        middle = data.geom_xpos[geom] + turned @ model.geom_aabb[geom, :3]
        half = np.abs(turned) @ model.geom_aabb[geom, 3:]
        boxes.append(np.r_[(middle - half)[:2], (middle + half)[:2]])
    return np.reshape(boxes, (-1, 4))


def owners_of(scene: Any) -> dict[int, str]:
    """{body: the object or fixture it belongs to}."""
    roots = {int(body): name for name, body in scene.env.obj_body_id.items()}
    owners: dict[int, str] = {}
    for body in range(1, scene.model.nbody):  # a parent comes before its children
        owner = roots.get(body) or owners.get(int(scene.model.body_parentid[body]))
        if owner is not None:
            owners[body] = owner
    return owners


def _radius(scene: Any, name: str) -> float:
    boxes = occupied(scene, set(scene.env.obj_body_id) - {name})
    return float(np.linalg.norm(boxes[:, 2:].max(axis=0) - boxes[:, :2].min(axis=0))) / 2


def _first_free(places: list[np.ndarray], radius: float, boxes: np.ndarray) -> np.ndarray:
    """The first place where a disc keeps clear of every box, else the one that comes nearest to it."""

    def room(place: np.ndarray) -> float:
        outside = np.maximum(np.maximum(boxes[:, :2] - place, place - boxes[:, 2:]), 0.0)
        return float(np.linalg.norm(outside, axis=1).min(initial=np.inf)) - radius

    free = next((place for place in places if room(place) >= CLEARANCE_M), None)
    return max(places, key=room) if free is None else free


def _set(scene: Any, name: str, place: np.ndarray) -> None:
    joint = scene.model.joint(scene.env.get_object(name).joints[0])
    start = int(joint.qposadr[0])
    scene.data.qpos[start : start + 2] = place
    scene.env.sim.forward()
