"""Where an installed simulator lives, and how its workers are started.

`<cache>/prts/sims/<family>/` (cache = $XDG_CACHE_HOME or ~/.cache) holds `venv/`, whatever the family's install.py puts
beside it (tasks.json, init_states/, assets), and `installed.json`, written last: a home without it is not installed. A
family of the main environment has no home.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prts_core
from prts_core.io.errors import UnavailableError
from prts_core.io.files import read_json
from prts_core.sim.suites import OVER, part


def cache() -> Path:
    """Of everything PRTS keeps for this user outside a project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prts"


@dataclass(frozen=True)
class Installation:
    """The folder of one family's simulator, there or not."""

    family: str

    @property
    def path(self) -> Path:
        return cache() / "sims" / self.family

    @property
    def python(self) -> Path:
        return self.path / "venv" / "bin" / "python"

    @property
    def record(self) -> Path:
        return self.path / "installed.json"

    def installed(self, wanted: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What installed.json says; None where there is none, or another than one that says `wanted`."""
        found: dict[str, Any] | None = read_json(self.record) if self.record.is_file() else None
        return found if found is not None and (wanted or {}).items() <= found.items() else None

    def require(self) -> dict[str, Any]:
        """The same. UnavailableError where the simulator is not installed."""
        found = self.installed()
        if found is None:
            raise UnavailableError(
                f"The simulator {self.family!r} is not installed",
                file=self.path,
                cure=f"prts sim install {self.family}",
            )
        return found


def base_home(home: Installation) -> Installation:
    """The home that holds the simulator itself: of a family that is laid over another one, that one's."""
    return Installation(OVER.get(home.family, home.family))


def in_main_environment(family: str) -> bool:
    """Whether the family's simulator lives beside PRTS and not in a home (its install.py says MAIN_ENVIRONMENT)."""
    return bool(getattr(part(family, "install"), "MAIN_ENVIRONMENT", False))


def interpreter(family: str) -> Path:
    """The Python that the family's workers run in. UnavailableError where the simulator is not installed."""
    if in_main_environment(family):
        return Path(sys.executable)
    home = Installation(family)
    home.require()
    return home.python


def code_folder(python: Path) -> Path:
    """A folder for PYTHONPATH from which `python` imports prts_core and nothing else of this environment.

    prts_core may lie among the packages of the main environment; a folder with a link to it alone keeps those out.
    """
    package = Path(prts_core.__file__).resolve().parent
    if python == Path(sys.executable):
        return package.parent
    folder = cache() / "sims" / ".code" / f"{zlib.crc32(str(package).encode()):08x}"
    link(folder / "prts_core", package)
    return folder


def link(place: Path, target: Path) -> None:
    """`place` becomes a link to the folder `target`, whatever it linked to before."""
    if place == target or (place.is_symlink() and place.readlink() == target):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}-{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target, target_is_directory=True)
    partial.replace(place)
