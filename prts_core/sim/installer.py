"""Does what installations of simulators have in common: assets, pinned packages, a self-check in a process, the record.

Every step leaves a mark when it is done, so that an interrupted installation goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_core.io.errors import ConfigError, SimulatorError, UnavailableError
from prts_core.io.files import digest_file, digest_value, write_json, write_text
from prts_core.sim.installations import Installation, code_folder

PRIVATE = ("PYTHON", "VIRTUAL_ENV")  # variables of this environment that another's Python must not see


STANDINS_NOTE = "STANDINS.md"  # a folder of assets that holds it says with it that they are not all the real ones
STANDINS = "stand-in assets"


def assets_here(home: Installation, given: str | None, shared: str) -> Path | None:
    """The folder of assets on this machine: `given`, else the one already linked, else $PRTS_SHARED/data/<shared>; None
    where there is none. ConfigError where `given` is no folder."""
    from prts_core.config.places import shared_folder

    if given is not None:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ConfigError("There is no such folder of assets", field="--assets", found=given)
        return folder.resolve()
    places = (home.path / "assets", shared_folder() / "data" / shared)
    return next((folder.resolve() for folder in places if folder.is_dir()), None)


def wanted(format: int, pins: Sequence[str], assets: Path) -> dict[str, Any]:
    """What makes an installation this one. format: of what the home holds."""
    note = assets / STANDINS_NOTE
    return {
        "format": format,
        "pins": dict(pin.split("==") for pin in pins),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "assets": str(assets),
        "standins": STANDINS if note.is_file() else "",
        "standins_digest": digest_file(note) if note.is_file() else "",
    }


def finish(home: Installation, wanted: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """Write installed.json, last of all; what it says."""
    installed = datetime.now(UTC).isoformat(timespec="seconds")
    record = {**wanted, "self_check": report, "installed": installed}
    write_json(home.record, record)
    return record


def packages(
    home: Installation,
    pins: Sequence[str],
    lock: int,
    *,
    title: str,
    first: tuple[Sequence[str], Sequence[str]] = ((), ()),
    cure: str = "run the same command where there is a network or a mirror of the package index",
) -> None:
    """`<home>/venv` with exactly `pins`, nothing resolved; what is there and made of the same pins stays.

    first: (pins, options of pip) that are installed before, from an index of their own. pip inherits the lock: where
    this process is killed, the next installation waits until pip has ended too. UnavailableError with what pip said.
    """
    place, mark = home.path / "venv", home.path / "venv" / "finished"
    every = (*first[0], *pins)
    made_from = digest_value({"pins": every, "python": sys.version})
    if mark.is_file() and mark.read_text() == made_from:
        return
    print(f"{title}: {len(every)} packages into {place}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=False)  # our own pip installs into it: a second one costs ten seconds
    pip = [sys.executable, "-m", "pip", "--python", str(home.python), "--disable-pip-version-check"]
    for chosen, options in (first, (pins, ())):
        if not chosen:
            continue
        done = subprocess.run(
            [*pip, "install", "--quiet", "--no-deps", *options, *chosen],
            capture_output=True,
            text=True,
            check=False,
            pass_fds=(lock,),
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise UnavailableError(
                f"{title}'s packages cannot be installed", file=place, found="\n".join(lines)[-800:], cure=cure
            )
    write_text(mark, made_from)


def self_check(
    home: Installation,
    module: str,
    *,
    title: str,
    seconds: float,
    cure: str,
    variables: Mapping[str, str],
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What `python -m module <home>` of the simulator's own Python reports: JSON in its last line.

    without: beginnings of variables' names that it must not inherit. SimulatorError with what it said where it fails.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith((*PRIVATE, *without))}
    environment = kept | {"PYTHONPATH": str(code_folder(home.python)), "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [str(home.python), "-m", module, str(home.path)],
            env=environment | dict(variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise SimulatorError(f"{title}'s self-check did not finish", file=home.path, found=str(err)[-500:]) from err
    report = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not report.startswith("{"):
        raise SimulatorError(
            f"{title} does not pass its self-check",
            file=home.path,
            found=(done.stdout + done.stderr).strip()[-1500:],
            cure=cure,
        )
    return json.loads(report)
