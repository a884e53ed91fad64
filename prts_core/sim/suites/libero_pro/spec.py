"""LIBERO-Pro's axes as suites: one for each, the forty tasks of four LIBERO suites each.

Its axes keep their names of the paper's tables: object, position, semantic, task, environment. What is LIBERO-Pro's
definition and what is ours stands in each suite's `source`; no result here is comparable with a published one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from prts_core.io.errors import ConfigError, UnavailableError
from prts_core.sim.installations import Installation
from prts_core.sim.suite import SuiteSpec, Task
from prts_core.sim.suites.libero import spec as libero
from prts_core.sim.suites.libero.perturb import PRO, instruction, pro
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero.spec import BASES

FAMILY = "libero_pro"
SUITES = tuple(f"libero_pro_{axis}" for axis in PRO)
SEMANTIC_LEVEL = 3  # of language.py
PAPER = "after LIBERO-Pro (Zhou et al. 2025, arXiv:2510.03827); a layer of PRTS over LIBERO, not its code or files"
SOURCES = {
    "object": "target and receptacle look otherwise; ours: another colour, where it has objects of its own",
    "position": "two objects trade the regions they begin in; ours: which two, and the rest begins as stored",
    "semantic": "the sentence in other words; ours: the words, from templates",
    "task": "another goal in the same scene, and its sentence; ours: which goal; it combines with nothing else",
    "environment": "the same task in another arena; ours: which one, from LIBERO's own; it released no such files",
}


def suites() -> dict[str, SuiteSpec]:
    """Every suite by name. UnavailableError where LIBERO or this layer is not installed."""
    Installation(FAMILY).require()
    home = Installation(libero.FAMILY)
    own = libero.suites()
    folders = sorted((home.path / "venv" / "lib").glob("python3*/site-packages/libero/libero/bddl_files"))
    if not folders:
        raise UnavailableError("LIBERO's descriptions are missing", file=home.path, cure="prts sim install libero")
    return suites_of(own, folders[0])


def suites_of(bases: Mapping[str, SuiteSpec], descriptions: Path) -> dict[str, SuiteSpec]:
    """The suites over LIBERO's own, whose descriptions (bddl) lie in a folder a suite. A task that an axis can do
    nothing to (one object cannot trade places) is left out of that axis."""
    problems = {name: pro.problems(descriptions / name) for name in BASES}
    found = {}
    for axis in PRO:
        tasks = tuple(task for name in BASES for task in _axis(axis, bases[name], problems[name]))
        found[f"libero_pro_{axis}"] = replace(
            bases[BASES[0]],
            name=f"libero_pro_{axis}",
            family=FAMILY,
            tasks=tasks,
            source=f"{PAPER}; {axis}: {SOURCES[axis]}. Else as LIBERO: {bases[BASES[0]].source}",
        )
    return found


def _axis(axis: str, base: SuiteSpec, problems: Mapping[str, Problem]) -> Iterator[Task]:
    for task in base.tasks:
        if axis == "semantic":
            changed = {axis: {"level": SEMANTIC_LEVEL, "seed": 0}}
        else:
            others = {other.instruction: problems[other.name] for other in base.tasks if other.name != task.name}
            try:
                changed = {axis: pro.settings_of(axis, problems[task.name], others, 0)}
            except ConfigError:
                continue
        yield replace(
            task,
            name=f"{task.name}__{axis}",
            instruction=instruction(task.instruction, changed, task.name),
            perturbation={"base": task.name, **changed},
        )
