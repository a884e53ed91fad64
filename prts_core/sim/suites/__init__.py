"""The families of simulation suites, by name: which family a suite belongs to, and how its parts are found.

It imports a family only when one of its suites is asked for. A family is a package with the files of sim/suite.py: one
of ours here, or one of somebody else's named by its dotted module path (`my_lab.suites.kitchen`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from prts_core.io.errors import ConfigError, lookup
from prts_core.sim.suite import SuiteSpec, Task

# Family -> its suites. Written down, because a family's own list may need its simulator's files.
FAMILIES: dict[str, tuple[str, ...]] = {
    "metaworld": ("metaworld",),
    "libero": ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "libero_130"),
    "libero_plus": (
        "libero_plus",
        "libero_plus_camera",
        "libero_plus_robot",
        "libero_plus_noise",
        "libero_plus_language",
        "libero_plus_light",
        "libero_plus_background",
        "libero_plus_layout",
        "libero_plus_list",
    ),
    "libero_pro": (
        "libero_pro_object",
        "libero_pro_position",
        "libero_pro_semantic",
        "libero_pro_task",
        "libero_pro_environment",
    ),
    "simpler": ("simpler_widowx",),
}
# A family laid over another one -> that one, whose installation, environment and expert it has.
OVER = {"libero_plus": "libero", "libero_pro": "libero"}
PARTS = ("spec", "environment", "install", "expert")


def part(family: str, name: str) -> ModuleType:
    """Module `name` (one of PARTS) of a family."""
    assert name in PARTS, name
    if name in ("environment", "expert"):
        family = OVER.get(family, family)
    package = family if "." in family else f"{__name__}.{family}"
    if "." not in family:
        lookup(FAMILIES, family, "simulator")
    return importlib.import_module(f"{package}.{name}")


def family_of(suite: str) -> str:
    """The family of a suite; a suite of somebody else's family is written `<dotted family>:<suite>`."""
    if ":" in suite:
        return suite.split(":", 1)[0]
    return lookup({name: family for family, names in FAMILIES.items() for name in names}, suite, "suite")


def suites_of(family: str, settings: Mapping[str, Any]) -> dict[str, SuiteSpec]:
    """A family's suites as its workers, made with `settings`, have them: another protocol only where its spec.py has
    `suites_for`."""
    spec = part(family, "spec")
    found: dict[str, SuiteSpec] = spec.suites_for(settings) if hasattr(spec, "suites_for") else spec.suites()
    return found


def suite(name: str, settings: Mapping[str, Any] | None = None) -> SuiteSpec:
    """The suite's protocol, as workers made with `settings` have it. UnavailableError where its tasks are only known
    once its simulator is installed."""
    return lookup(suites_of(family_of(name), settings or {}), name.split(":", 1)[-1], "suite")


def task_of(spec: SuiteSpec, name: str) -> Task:
    """Its task of that name. ConfigError with the nearest names otherwise."""
    found = [task for task in spec.tasks if task.name == name]
    if len(found) > 1:
        raise ConfigError("A suite has two tasks of one name", field=spec.name, found=name)
    return found[0] if found else lookup({task.name: task for task in spec.tasks}, name, f"task of {spec.name}")
