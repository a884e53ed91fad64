"""Installs SimplerEnv into a home of its own: pinned packages, CPU torch, linked assets, a self-check.

The simulator draws with Vulkan on the CPU, which takes a driver of Mesa that is new enough; it is looked for before
anything is built and proven by the self-check.

    <home>/venv/         packages, all pinned and none resolved: ManiSkill's own would bring torch for CUDA and a
                         motion planner, which these tasks do not use
    <home>/assets        link to what ManiSkill takes as MS_ASSET_DIR: meshes, textures, photographs, the robot
    <home>/fetched/      the assets, where ManiSkill's own downloader had to get them
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from prts_core.io.errors import DataError, UnavailableError
from prts_core.io.locks import locked
from prts_core.sim import installer
from prts_core.sim.installations import Installation, link
from prts_core.sim.suites.simpler.assets import BRIDGE, NEEDED, ROBOT, unavailable
from prts_core.sim.suites.simpler.spec import TASKS

FORMAT = 1  # of what a home holds; another one is built anew
TITLE = "SimplerEnv"
TORCH = "torch==2.13.0+cpu"  # named as a CPU build, so that no index can answer with one for CUDA
PINS = (
    "mani_skill==3.0.1",
    "sapien==3.0.3",
    "numpy==2.4.6",
    "scipy==1.17.1",
    "gymnasium==1.4.0",
    "Farama-Notifications==0.0.6",
    "cloudpickle==3.1.2",
    "typing_extensions==4.16.0",
    "dacite==1.9.2",
    "h5py==3.16.0",
    "PyYAML==6.0.3",
    "tqdm==4.70.1",
    "GitPython==3.2.1",
    "gitdb==4.0.12",
    "smmap==5.0.3",
    "tabulate==0.10.0",
    "transforms3d==0.4.2",
    "trimesh==5.2.0",
    "ImageIO==2.38.1",
    "pillow==13.0.0",
    "pytorch-kinematics==0.7.6",
    "pytorch-seed==0.2.0",
    "arm_pytorch_utilities==0.5.0",
    "absl-py==2.5.1",
    "lxml==6.1.3",
    "networkx==3.6.1",
    "defusedxml==0.7.1",
    "matplotlib==3.11.2",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "kiwisolver==1.5.1",
    "packaging==26.3",
    "pyparsing==3.3.3",
    "python-dateutil==4.0.0",
    "opencv-python-headless==5.0.0.93",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "idna==3.20",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "pyperclip==1.11.0",
    "importlib_resources==7.1.0",
    "setuptools==84.2.1",
    "huggingface_hub==2.4.0",
    "filelock==4.2.11",
    "fsspec==2026.9.0",
    "httpx2==2.16.2",
    "httpcore2==2.16.2",
    "h11==0.16.0",
    "anyio==4.16.0",
    "truststore==0.10.5",
    "click==8.5.1",
    "sympy==1.14.0",
    "mpmath==1.3.0",
    "Jinja2==3.1.6",
    "MarkupSafe==3.0.4",
    "msgpack==1.2.4",
    "ipython==9.18.1",
    "ipython_pygments_lexers==1.1.1",
    "Pygments==2.21.0",
    "jedi==0.20.1",
    "parso==0.8.7",
    "matplotlib-inline==0.2.2",
    "traitlets==5.16.1",
    "pexpect==4.9.0",
    "ptyprocess==0.7.0",
    "prompt_toolkit==3.0.53",
    "wcwidth==0.9.4",
    "stack-data==0.6.3",
    "executing==2.3.0",
    "asttokens==3.0.2",
    "pure_eval==0.2.4",
    "psutil==7.2.2",
)
DOWNLOADS = ("widowx250s", "bridge_v2_real2sim")  # what ManiSkill's downloader calls the assets
CHECK_SECONDS = 600.0
DRIVER = (
    "a Vulkan driver of Mesa 24.3 or later: apt-get install mesa-vulkan-drivers (Debian bookworm: "
    "apt-get install -t bookworm-backports mesa-vulkan-drivers)"
)
_DRIVER_FOLDERS = ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")
_DRIVER_VARIABLES = ("VK_DRIVER_FILES", "VK_ADD_DRIVER_FILES", "VK_ICD_FILENAMES")


def install(home: Installation, assets: str | None = None) -> dict[str, Any]:
    """Install, or go on, or find everything done; what installed.json says.

    assets: a folder; none: what is already linked, else $PRTS_SHARED/data/simpler_assets, else ManiSkill's downloader.
    Raises UnavailableError where a driver, packages or assets cannot be had, DataError for a folder that is not what it
    should be, SimulatorError where the self-check fails.
    """
    with locked(home.path / ".lock") as lock:
        folder = installer.assets_here(home, assets, "simpler_assets")
        if folder is not None and (found := home.installed(_wanted(_checked(folder)))) is not None:
            return found
        look_for_a_driver()
        home.record.unlink(missing_ok=True)
        index = os.environ.get("PRTS_TORCH_INDEX")
        installer.packages(
            home,
            PINS,
            lock,
            title=TITLE,
            first=((TORCH,), ("--index-url", index) if index else ()),
            cure=f"where it is {TORCH}: PRTS_TORCH_INDEX=<index of the CPU builds> prts sim install simpler; else run "
            "the same command where there is a network or a mirror of the package index",
        )
        folder = _checked(_fetch(home, lock) if folder is None else folder)
        link(home.path / "assets", folder)
        return installer.finish(home, _wanted(folder), check(home))


def check(home: Installation) -> dict[str, Any]:
    """The self-check in the simulator's own Python: one task is made, reset, stepped and looked at, compared with
    itself after another episode and with ManiSkill's own loop. SimulatorError with what it said where it fails."""
    return installer.self_check(
        home,
        "prts_core.sim.suites.simpler.check",
        title=TITLE,
        seconds=CHECK_SECONDS,
        without=("MS_",),
        cure=f"where it speaks of a physical device, a renderer or Vulkan: {DRIVER}",
        variables={"LP_NUM_THREADS": "1"},
    )


def look_for_a_driver() -> None:
    """UnavailableError where this machine has no Vulkan driver at all; an old one shows in the self-check."""
    if any(os.environ.get(name) for name in _DRIVER_VARIABLES):
        return
    if not any(path.suffix == ".json" for folder in _DRIVER_FOLDERS for path in _files(Path(folder))):
        raise UnavailableError(
            "SimplerEnv's renderer finds no Vulkan driver", file=_DRIVER_FOLDERS[0], found="no driver", cure=DRIVER
        )


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _wanted(assets: Path) -> dict[str, Any]:
    """What makes an installation this one."""
    found, lacking = installer.wanted(FORMAT, (TORCH, *PINS), assets), unavailable(assets)
    label = ", ".join(filter(None, [found["standins"], *(f"without {task}" for task in lacking)]))
    return found | {"unavailable": lacking, "standins": label}


def _checked(folder: Path) -> Path:
    lacking = [str(name) for name in NEEDED if not (folder / name).exists()]
    if lacking or len(unavailable(folder)) == len(TASKS):
        raise DataError(
            "A folder of assets is not SimplerEnv's",
            file=folder,
            field=lacking[0] if lacking else next(iter(unavailable(folder).values())),
            found="missing",
            expected=f"what ManiSkill takes as MS_ASSET_DIR, with {ROBOT} and {BRIDGE}",
        )
    return folder


def _fetch(home: Installation, lock: int) -> Path:
    """Through ManiSkill's own downloader, which checks what it gets against its own list."""
    place, partial = home.path / "fetched", home.path / "fetching"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(installer.PRIVATE)}
    for name, target in zip(DOWNLOADS, (ROBOT, BRIDGE), strict=True):
        if (place / target).is_dir():
            continue
        print(f"{TITLE}: fetching {name}", file=sys.stderr, flush=True)
        shutil.rmtree(partial, ignore_errors=True)  # what an interrupted one unpacked
        partial.mkdir()
        done = subprocess.run(
            [str(home.python), "-m", "mani_skill.utils.download_asset", name, "--non-interactive", "--quiet"],
            env=environment | {"MS_ASSET_DIR": str(partial)},
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock,),
        )
        if done.returncode or not (partial / target).is_dir():
            raise UnavailableError(
                "SimplerEnv's assets are neither here nor can they be fetched",
                field=name,
                found=(done.stdout + done.stderr).strip().rpartition("\n")[2][-400:],
                cure="prts sim install simpler --assets FOLDER, what ManiSkill takes as MS_ASSET_DIR",
            )
        (place / target).parent.mkdir(parents=True, exist_ok=True)
        (partial / target).rename(place / target)
    shutil.rmtree(partial, ignore_errors=True)
    return place
