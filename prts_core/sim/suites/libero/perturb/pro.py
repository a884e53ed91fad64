"""LIBERO-Pro's axes as changes of a task's description: object, position, task, environment.

Definition (arXiv:2510.03827): object - target and receptacle look otherwise; position - two objects trade the regions
they begin in, sentence and goal unchanged; semantic - the sentence in other words (language.py); task - another goal in
the same scene, and its sentence; environment - the same task in another arena. Ours: which objects, colours, goals and
arenas; LIBERO-Pro reads them from files of its fork, draws initial states anew and changes categories (a yellow plate).
Here what is not changed begins exactly as stored, and in `environment` as stored on the other table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero.perturb.draws import MAX_SEED, draw, integer, only
from prts_core.sim.suites.libero.perturb.layout import owners_of

# Arena -> LIBERO's problem, its workspace, that one's category and where its middle is (m).
ARENAS = {
    "tabletop": ("libero_tabletop_manipulation", "main_table", "table", (0.0, 0.0, 0.9)),
    "kitchen": ("libero_kitchen_tabletop_manipulation", "kitchen_table", "kitchen_table", (0.0, 0.0, 0.9)),
    "living_room": (
        "libero_living_room_tabletop_manipulation",
        "living_room_table",
        "living_room_table",
        (0.0, 0.0, 0.41),
    ),
    "study": ("libero_study_tabletop_manipulation", "study_table", "study_table", (-0.2, 0.0, 0.867)),
    "floor": ("libero_floor_manipulation", "floor", "floor", (0.0, 0.0, -0.035)),
}
PLACING = ("in", "on")


def settings_of(axis: str, problem: Problem, siblings: Mapping[str, Problem], seed: int) -> dict[str, Any]:
    """What `axis` does to this task, as plain data. ConfigError where it can do nothing.

    siblings: {sentence: description} of the other tasks of its suite, for their goals.
    """
    rng = draw("pro", axis, seed, problem.text())
    made: dict[str, Any] = {"seed": seed}
    if axis == "position":
        made["pair"] = _pair(problem, rng)
    elif axis == "task":
        made |= _other_goal(problem, siblings, rng)
    elif axis == "environment":
        own = _arena(problem)
        choice = [name for name in ("tabletop", "kitchen", "living_room", "study") if name != own]
        made["arena"] = choice[int(rng.integers(len(choice)))]
    return made


def _pair(problem: Problem, rng: np.random.Generator) -> list[str]:
    free = list(problem.lying())
    wanted = [name for name in problem.section(":obj_of_interest")[1:] if name in free] or free
    kind = problem.objects.get(wanted[0]) if wanted else None  # two of a kind may trade places unseen
    others = [name for name in free if problem.objects[name] != kind]
    if not others:
        raise ConfigError("Two objects that lie free cannot be found", field="position", found=str(problem.file))
    return [wanted[0], others[int(rng.integers(len(others)))]]


def _other_goal(problem: Problem, siblings: Mapping[str, Problem], rng: np.random.Generator) -> dict[str, Any]:
    alike = [
        (name, other)
        for name, other in sorted(siblings.items())
        if other.objects == problem.objects and other.fixtures == problem.fixtures and other.goal != problem.goal
    ]
    if alike:
        sentence, sibling = alike[int(rng.integers(len(alike)))]
        return {"goal": sibling.goal, "instruction": sentence}
    placing = [clause for clause in problem.goal if len(clause) == 3 and clause[0] in PLACING]
    in_goal = {name for clause in problem.goal for name in clause}
    for predicate, target, place in placing:
        others = [
            name
            for name, category in problem.objects.items()
            if name not in in_goal and not place.startswith(name) and category != problem.objects.get(target)
        ]
        if others:
            other = others[int(rng.integers(len(others)))]
            said = f"pick up the {_words(problem.objects[other])} and place it {_where(problem, predicate, place)}"
            return {"goal": [[predicate, other, place]], "instruction": said}
    raise ConfigError("No other goal can be found for this task", field="task", found=str(problem.file))


def _words(category: str) -> str:
    for maker in ("akita_", "glazed_rim_porcelain_", "chefmate_8_"):
        category = category.removeprefix(maker)
    return category.replace("_", " ")


def _where(problem: Problem, predicate: str, place: str) -> str:
    things = problem.objects | problem.fixtures
    owner = max((name for name in things if place.startswith(name)), key=len, default=place)
    part = place.removeprefix(owner).removesuffix("_region").strip("_").replace("_", " ")
    said = _words(things.get(owner, owner))
    part = part.removesuffix("contain").strip()
    if part in ("", "cook", "heating"):
        return f"{predicate} the {said}"
    return f"{predicate} the {part} of the {said}"


def _arena(problem: Problem) -> str:
    name = str(problem.section("problem")[-1])
    return next((arena for arena, (own, *_) in ARENAS.items() if own == name), "")


def rewrite(problem: Problem, axis: str, settings: Mapping[str, Any]) -> list[str]:
    """Change the description by settings of `settings_of`; the objects whose places are drawn anew.

    ConfigError for settings that do not fit the task.
    """
    check(axis, settings)
    if axis == "position":
        first, second = settings["pair"]
        regions = problem.lying()
        for name in (first, second):
            if name not in regions:
                raise ConfigError(
                    "No such object lies free in this task",
                    field="position.pair",
                    found=name,
                    expected=", ".join(regions),
                )
        for clause in problem.section(":init")[1:]:
            if clause[1] in (first, second) and clause[2] == regions[clause[1]]:
                clause[2] = regions[second if clause[1] == first else first]
        return [first, second]
    if axis == "task":
        known = {"not", *problem.objects, *problem.fixtures}
        for clause in settings["goal"]:
            for name in clause[1:]:
                if not any(name.startswith(one) for one in known):
                    raise ConfigError("The task's scene has no such thing", field="task.goal", found=name)
        problem.set_goal([list(clause) for clause in settings["goal"]])
    elif axis == "environment":
        _move(problem, settings["arena"])
    return []


def carried(problem: Problem, arena: str) -> np.ndarray:
    """(3,) m from the middle of the task's own arena to that of `arena`."""
    own = _arena(problem)
    if not own:
        raise ConfigError("A task's arena is not known", field="environment", found=str(problem.section("problem")[-1]))
    return np.subtract(ARENAS[arena][3], ARENAS[own][3])


def _move(problem: Problem, arena: str) -> None:
    """Into another arena: another problem, and its workspace wherever the old one is named."""
    name, top, category, _ = ARENAS[arena]
    old = problem.workspace()
    problem.section("problem")[-1] = name

    def renamed(tree: Any) -> Any:
        if isinstance(tree, str):
            return top + tree.removeprefix(old) if tree == old or tree.startswith(old + "_") else tree
        return [renamed(part) for part in tree]

    problem.tree = renamed(problem.tree)
    fixtures = problem.section(":fixtures")
    fixtures[fixtures.index(top) + 2] = category


def check(axis: str, settings: Mapping[str, Any]) -> None:
    """ConfigError where these are no settings of `axis`, whatever the task."""
    keys = {"object": (), "position": ("pair",), "task": ("goal", "instruction"), "environment": ("arena",)}[axis]
    only(axis, settings, "seed", *keys)
    integer(axis, settings, "seed", 0, MAX_SEED, 0)

    def words(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(word, str) for word in value)

    ok = {
        "object": lambda: True,
        "position": lambda: words(settings.get("pair")) and len(set(settings["pair"])) == 2,
        "task": lambda: (
            isinstance(settings.get("goal"), (list, tuple))
            and bool(settings["goal"])
            and all(words(clause) and len(clause) in (2, 3) for clause in settings["goal"])
        ),
        "environment": lambda: settings.get("arena") in ARENAS,
    }[axis]()
    if not ok:
        expected = {"position": "two names", "task": "clauses [predicate, name, ...]", "environment": ", ".join(ARENAS)}
        raise ConfigError(
            f"{axis}: not a value of it",
            field=f"{axis}.{keys[0]}",
            found=settings.get(keys[0]),
            expected=expected[axis],
        )


def recolour(scene: Any, settings: Mapping[str, Any], task: str) -> None:
    """The axis `object`: what the task is about, in other colours. MjModel's materials are restored at a reset."""
    check("object", settings)
    rng = draw("object", settings.get("seed", 0), task)
    model, env, owners = scene.model, scene.env, owners_of(scene)
    for thing in env.obj_of_interest:
        owner = max((name for name in env.obj_body_id if thing.startswith(name)), key=len, default=None)
        colour = rng.permutation([0.25, 0.6, 1.0])
        if owner is None:
            continue
        for geom in range(model.ngeom):
            if owners.get(int(model.geom_bodyid[geom])) == owner:
                material = int(model.geom_matid[geom])
                target = model.geom_rgba[geom] if material < 0 else model.mat_rgba[material]
                target[:3] = np.clip(colour, 0, 1)


def problems(folder: Path) -> dict[str, Problem]:
    """{task: its description} of one suite's folder."""
    return {path.stem: Problem.read(path) for path in sorted(folder.glob("*.bddl"))}
