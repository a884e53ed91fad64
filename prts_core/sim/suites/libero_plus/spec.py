"""LIBERO-Plus's axes as suites: one for each axis, all of them, and the tasks of a user's own list. No simulator.

A suite takes the four suites that LIBERO-Plus takes, and every task of theirs at five strengths of every kind of its
axis. What is LIBERO-Plus's own definition and what is ours stands in each suite's `source`: results are not comparable
with published ones, except on a list of its own task names (`libero_plus_list`), and there only axis by axis as its
source says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

from prts_core.io.errors import DataError
from prts_core.io.files import read_json
from prts_core.sim.installations import Installation
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.libero import spec as libero
from prts_core.sim.suites.libero.perturb import PLUS, background, camera, instruction, language, layout, light, noise
from prts_core.sim.suites.libero.perturb import robot as robot_axis
from prts_core.sim.suites.libero.perturb.draws import LEVELS, draw
from prts_core.sim.suites.libero.spec import BASES
from prts_core.sim.suites.libero_plus.names import parse

FAMILY = "libero_plus"
LIST = "libero_plus_list"
SUITES = ("libero_plus", *(f"libero_plus_{axis}" for axis in PLUS), LIST)
KINDS = {
    "camera": camera.KINDS,
    "robot": robot_axis.KINDS,
    "noise": noise.KINDS,
    "language": language.KINDS,
    "light": light.KINDS,
    "background": background.KINDS,
    "layout": layout.KINDS,
}
# The list where the user gives none: names of LIBERO-Plus's, one of each axis that a name alone describes.
_BOWL = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
EXAMPLES = (
    f"{_BOWL}_view_0_0_100_2_352_initstate_0",
    f"{_BOWL}_view_11_15_100_0_0_initstate_0",
    f"{_BOWL}_view_0_0_100_0_0_initstate_1",
    f"{_BOWL}_view_0_0_100_0_0_initstate_0_noise_26",
)
EPISODES_PER_TASK = 1  # LIBERO-Plus runs every variant once
PAPER = "after LIBERO-Plus (Fei et al. 2025, arXiv:2510.13626); a layer of PRTS over LIBERO, not its code or files"
LEVEL = (
    "levels 1 to 5 are strengths of ours; LIBERO-Plus's difficulty counts how many of four reference policies failed"
)
# What is the public benchmark's, and what is ours, axis by axis.
SOURCES = {
    "camera": "its parameters and ranges; ours: the views chosen, about the middle of the scene's own table or floor",
    "robot": "its 500 joint angles; ours: the arm is moved there, where its code lets the stored state overwrite it",
    "noise": "its families, ten severities and strengths, scene camera only; ours: the filters' code and their draws",
    "language": "its kinds; ours: the words, from templates instead of a language model",
    "light": "its kinds; ours: every value",
    "background": "its kinds; ours: LIBERO's own textures instead of its 950",
    "layout": "its kinds; ours: LIBERO's own objects instead of its 416, and every place",
}
LIST_SOURCE = (
    f"{PAPER}; tasks by LIBERO-Plus's own names: camera about its table scenes' pivot, noise as in libero_plus, robot "
    "as in its code (the stored state keeps the arm, the controller rests elsewhere); the sentence is LIBERO's own, "
    "without numbers"
)


def suites() -> dict[str, SuiteSpec]:
    """Every suite by name. UnavailableError where LIBERO or this layer is not installed.

    `libero_plus_list` is the list that was given at installation, else a few examples.
    """
    home = Installation(FAMILY)
    home.require()
    return suites_of(libero.suites(), home.path / "tasks.json")


def suites_of(bases: dict[str, SuiteSpec], catalogue: Path) -> dict[str, SuiteSpec]:
    """The suites over LIBERO's own. catalogue: what install.py made of a user's list; it may be absent."""
    own = {task.name: task for name in BASES for task in bases[name].tasks}
    made = {axis: tuple(_axis(axis, own.values())) for axis in PLUS}
    like = bases[BASES[0]]
    found = {
        f"libero_plus_{axis}": _suite(like, f"libero_plus_{axis}", tasks, f"{PAPER}; {axis}: {SOURCES[axis]}; {LEVEL}")
        for axis, tasks in made.items()
    }
    turns = zip_longest(*made.values())  # axis by axis in turn, for the same reason
    everything = tuple(task for turn in turns for task in turn if task is not None)
    told = "; ".join(f"{axis}: {SOURCES[axis]}" for axis in PLUS)
    found["libero_plus"] = _suite(like, "libero_plus", everything, f"{PAPER}; {told}; {LEVEL}")
    found[LIST] = _suite(like, LIST, _listed(catalogue, own), LIST_SOURCE)
    return {name: found[name] for name in SUITES}


def _axis(axis: str, bases: Iterable[Task]) -> Iterator[Task]:
    """Every base task in turn, each with its variants in an order of its own, so that the first tasks of the suite are
    as fair a sample as all of them: a run may be shorter than the suite."""
    variants = [(kind, level) for kind in KINDS[axis] for level in LEVELS]
    orders = [(base, draw("order", axis, base.name).permutation(len(variants))) for base in bases]
    for turn in range(len(variants)):
        for base, order in orders:
            kind, level = variants[order[turn]]
            changed = {axis: {"kind": kind, "level": level, "seed": 0}}
            yield replace(
                base,
                name=f"{base.name}__{axis}_{kind}_{level}",
                instruction=instruction(base.instruction, changed, base.name),
                perturbation={"base": base.name, **changed},
            )


def _listed(catalogue: Path, own: dict[str, Task]) -> tuple[Task, ...]:
    if catalogue.is_file():
        entries = read_json(catalogue)
    else:
        entries = {"tasks": [asdict(parse(name)) for name in EXAMPLES]}
    try:
        return tuple(
            replace(
                own[entry["base"]],
                name=str(entry["name"]),
                perturbation={"base": entry["base"], **entry["perturbation"]},
            )
            for entry in entries["tasks"]
        )
    except (KeyError, TypeError) as err:
        raise DataError(
            "The list of LIBERO-Plus tasks is damaged",
            file=catalogue,
            found=f"{type(err).__name__}: {err}",
            cure="prts sim install libero_plus --assets LIST",
        ) from err


def _suite(like: SuiteSpec, name: str, tasks: tuple[Task, ...], source: str) -> SuiteSpec:
    return replace(
        like,
        name=name,
        family=FAMILY,
        tasks=tasks,
        episodes_per_task=EPISODES_PER_TASK,
        source=f"{source}. Every variant once, else as LIBERO: {like.source}",
    )
