"""Perturbed LIBERO: what Task.perturbation means and how one episode is changed by it. It knows no worker and no suite.

A perturbation is plain data: {axis: settings, ..., "base": LIBERO's own task}. Axes of LIBERO-Plus: camera, robot,
noise, language, light, background, layout. Axes of LIBERO-Pro: object, position, semantic, task, environment. They
combine, except `task`, which stands alone. Everything follows from the settings, the task and the episode; each axis's
module says which of it is the public benchmark's definition and which is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.io.files import write_text
from prts_core.sim.suite import BASE, Task
from prts_core.sim.suites.libero.perturb import background, camera, language, layout, light, noise, pro, robot
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero.perturb.draws import draw, levelled

PLUS = ("camera", "robot", "noise", "language", "light", "background", "layout")
PRO = ("object", "position", "semantic", "task", "environment")
DROP_M = 0.03  # what does not begin as stored falls this far: heights that LIBERO draws may reach into a table
REWRITING = ("layout", "position", "task", "environment")


def check(perturbation: Mapping[str, Any], task: str) -> dict[str, Mapping[str, Any]]:
    """{axis: settings} without `base`. ConfigError for an unknown axis, settings or a combination that cannot be."""
    axes = {name: settings for name, settings in perturbation.items() if name != BASE}
    for name, settings in axes.items():
        if name not in PLUS + PRO:
            raise ConfigError(
                "There is no such perturbation", field="perturbation", found=name, expected=", ".join(PLUS + PRO)
            )
        if not isinstance(settings, Mapping):
            raise ConfigError("A perturbation's settings are no mapping", field=name, found=settings)
        _CHECKS[name](settings, task)
    if "task" in axes and len(axes) > 1:
        raise ConfigError("The axis `task` combines with nothing else", field="perturbation", found=", ".join(axes))
    if {"language", "semantic"} <= set(axes):
        raise ConfigError("An instruction can be rewritten once", field="perturbation", found="language, semantic")
    if not isinstance(perturbation.get(BASE, ""), str):
        raise ConfigError("A task is not a name", field=f"perturbation.{BASE}", found=perturbation[BASE])
    return axes


_CHECKS: dict[str, Any] = {
    "camera": camera.view_of,
    "robot": robot.start_of,
    "noise": lambda settings, task: noise.filter_of(settings),
    "language": lambda settings, task: levelled("language", settings, language.KINDS),
    "semantic": lambda settings, task: levelled("semantic", settings, language.KINDS),
    "light": lambda settings, task: levelled("light", settings, light.KINDS),
    "background": lambda settings, task: levelled("background", settings, background.KINDS),
    "layout": lambda settings, task: levelled("layout", settings, layout.KINDS),
    **{axis: lambda settings, task, axis=axis: pro.check(axis, settings) for axis in PRO if axis != "semantic"},
}


def instruction(own: str, perturbation: Mapping[str, Any], task: str) -> str:
    """What a perturbed task says, from the sentence of LIBERO's own `task`."""
    for axis in ("language", "semantic"):
        if axis in perturbation:
            return language.rewritten(own, perturbation[axis], task)
    return str(perturbation.get("task", {}).get("instruction", own))


class Change:
    """What one episode's perturbation does, at each moment at which LIBERO can be changed. Nothing for a plain task."""

    def __init__(self, task: Task) -> None:
        self.base = task.perturbation.get(BASE, task.name)
        self.axes = check(task.perturbation, self.base)
        self.spoken = task.instruction
        self.added: list[str] = []
        self.drawn: list[str] = []
        self.problem: Problem | None = None
        self.episode = 0

    def expect(self, own: str) -> None:
        """ConfigError where the task does not say what its perturbation makes of LIBERO's own sentence.

        The sentence is the suite's: whoever lays these axes over a task has to give it the new sentence too.
        """
        said = instruction(own, self.axes, self.base)
        if {"language", "semantic", "task"} & set(self.axes) and said != self.spoken:
            raise ConfigError(
                "A perturbation of the instruction without the new instruction",
                field="perturbation",
                found=self.spoken,
                expected=said,
                cure="choose a task of the suite that carries this axis",
            )

    def description(self, own: Path, folder: Path) -> Path:
        """The description of the episode's scene: LIBERO's own file, or a changed one in `folder`."""
        if not set(REWRITING) & set(self.axes):
            return own
        self.problem, changed = Problem.read(own), Problem.read(own)
        for axis in ("position", "task"):
            if axis in self.axes:
                self.drawn += pro.rewrite(changed, axis, self.axes[axis])
        if "layout" in self.axes:
            self.added = layout.rewrite(changed, self.axes["layout"], self.base)
        if "environment" in self.axes:  # last: it renames what the others name
            pro.rewrite(changed, "environment", self.axes["environment"])
        text = changed.text()
        if text == self.problem.text():
            return own
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.bddl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return path

    @property
    def rearranges(self) -> bool:
        """Whether the episode begins in another state than the stored one. Known after `description`."""
        return self.problem is not None

    def arrange(self, scene: Any, stored: np.ndarray) -> np.ndarray:
        """(1 + nq + nv,) the state to begin from, of a scene whose objects LIBERO has just placed."""
        assert self.problem is not None
        state = merged(scene, stored, self.added, self.drawn)
        fresh = dict.fromkeys((*self.added, *self.drawn), np.zeros(3))
        if "environment" in self.axes:
            away = pro.carried(self.problem, self.axes["environment"]["arena"])
            fresh |= {name: away for name in scene.env.objects_dict if name not in fresh}
        for name, away in fresh.items():
            at = 1 + int(scene.model.joint(scene.env.get_object(name).joints[0]).qposadr[0])
            state[at : at + 3] += away + np.array([0.0, 0.0, DROP_M])
        if "layout" in self.axes:
            scene.env.sim.set_state_from_flattened(state)
            scene.env.sim.forward()
            layout.arrange(scene, self.axes["layout"], self.base, self.problem, self.added)
            state = np.r_[state[0], scene.data.qpos, state[1 + len(scene.data.qpos) :]]
        return state

    def begin(self, scene: Any, episode: int) -> None:
        """Change a scene that was just reset, before it settles. `episode`: a number that tells episodes apart."""
        self.episode = episode
        background.restore(scene)
        model, axes = scene.model, self.axes
        if "camera" in axes:
            camera.begin(model, axes["camera"], self.base, float(scene.env.workspace_offset[2]))
        if "light" in axes:
            light.begin(model, axes["light"], self.base)
        if "background" in axes:
            background.begin(scene, axes["background"], self.base)
        if "object" in axes:
            pro.recolour(scene, axes["object"], self.base)
        if "robot" in axes:
            robot.begin(scene.env.robots[0], scene.data, robot.start_of(axes["robot"], self.base))
            scene.env.sim.forward()
        if axes:
            scene.place_cameras()  # and lamps; a whole forward pass would warm the solver and change the physics

    def pictures(self, seen: dict[str, np.ndarray], step: int) -> dict[str, np.ndarray]:
        """What the policy gets of what the cameras saw at `step`."""
        if "noise" not in self.axes:
            return seen
        family, severity = noise.filter_of(self.axes["noise"])
        rng = draw("noise", family, severity, self.axes["noise"].get("seed", 0), self.base, self.episode, step)
        return {
            key: noise.filtered(picture, family, severity, rng) if key == noise.CAMERA_KEY else picture
            for key, picture in seen.items()
        }


def merged(scene: Any, stored: np.ndarray, added: list[str], drawn: list[str]) -> np.ndarray:
    """The stored state of LIBERO's own scene in a scene with more objects; `added` and `drawn` ones stay where LIBERO
    placed them. LIBERO's joints come in the order of its description, the robot's first."""
    model, data = scene.model, scene.data
    owners = {joint: name for name in (*added, *drawn) for joint in scene.env.get_object(name).joints}
    positions, velocities = np.array(data.qpos), np.zeros(model.nv)
    widths = {0: (7, 6), 1: (4, 3), 2: (1, 1), 3: (1, 1)}  # of mjJNT_FREE, BALL, SLIDE, HINGE
    kept = [index for index in range(model.njnt) if owners.get(model.joint(index).name) not in added]
    nq = sum(widths[int(model.jnt_type[index])][0] for index in kept)
    nv = sum(widths[int(model.jnt_type[index])][1] for index in kept)
    if len(stored) != 1 + nq + nv:
        raise ConfigError(
            "A stored initial state does not fit the changed scene",
            field="perturbation",
            found=f"{len(stored)} numbers",
            expected=f"{1 + nq + nv}",
        )
    at_q, at_v = 1, 1 + nq
    for index in kept:
        width_q, width_v = widths[int(model.jnt_type[index])]
        if owners.get(model.joint(index).name) not in drawn:
            q, v = int(model.jnt_qposadr[index]), int(model.jnt_dofadr[index])
            positions[q : q + width_q] = stored[at_q : at_q + width_q]
            velocities[v : v + width_v] = stored[at_v : at_v + width_v]
        at_q, at_v = at_q + width_q, at_v + width_v
    return np.r_[stored[0], positions, velocities]
