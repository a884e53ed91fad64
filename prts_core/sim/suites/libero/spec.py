"""LIBERO's suites as data: 130 tasks under the protocol that published policies are evaluated with. No simulator.

The tasks themselves (names, sentences, counts of initial states) are read from the installed simulator's tasks.json;
what the numbers of state and action mean is that of configs/robots/libero_panda.yaml, which a test compares.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.contract import Camera, Contract, Dimension
from prts_core.io.errors import DataError
from prts_core.io.files import read_json
from prts_core.sim.suite import SuiteSpec, Task

FAMILY = "libero"
CONTROL_HZ = 20.0
IMAGE_SIZE = 256
# Longest demonstration of each suite, rounded up: control steps after settling.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
SUITES = (*MAX_STEPS, "libero_130")  # the last: all of them
BASES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")  # that LIBERO-Plus and LIBERO-Pro change
SOURCE = (
    "LIBERO (Liu et al. 2023, arXiv:2306.03310) as evaluated by OpenVLA (arXiv:2406.09246) and openpi: the stored "
    "initial states in order, 50 episodes a task, 10 settling steps with an open gripper, 220 / 280 / 300 / 520 / 400 "
    "steps (spatial, object, goal, 10, 90), both cameras at 256 px and turned by 180 degrees, seed 7; here without "
    "multisampling, and the fixtures' poses drawn from (seed, task, initial state) instead of the order of episodes"
)


def contract(image_size: int = IMAGE_SIZE) -> Contract:
    """State: hand position, its rotation as axis-angle, two fingers. Action: displacements of the hand (1 is 5 cm or
    0.5 rad), already relative, so that nothing is subtracted in training; and the gripper."""
    return Contract(
        embodiment="libero_panda",
        control_hz=CONTROL_HZ,
        state=(
            *(Dimension(f"hand_{axis}", "m") for axis in "xyz"),
            *(Dimension(f"hand_axis_angle_{axis}", "rad") for axis in "xyz"),
            Dimension("finger_left", "m"),
            Dimension("finger_right", "m"),
        ),
        action=(
            *(Dimension(f"hand_d{axis}", "1") for axis in "xyz"),
            *(Dimension(f"hand_drotation_{axis}", "1") for axis in "xyz"),
            Dimension("gripper", "1"),
        ),
        cameras=(
            Camera("observation.images.image", "Camera", image_size, image_size),
            Camera("observation.images.wrist_image", "Wrist camera", image_size, image_size),
        ),
        rotation="axis-angle",
        gripper="-1 opens, +1 closes",
    )


def suites() -> dict[str, SuiteSpec]:
    """Every suite by name. UnavailableError where LIBERO is not installed, DataError for a damaged tasks.json."""
    from prts_core.sim.installations import Installation

    home = Installation(FAMILY)
    installed = home.require()
    return suites_of(home.path / "tasks.json", str(installed.get("standins", "")))


def suites_of(catalogue: Path, standins: str = "") -> dict[str, SuiteSpec]:
    """The suites of a tasks.json: {"tasks": {name: {folder, instruction, initial_states, digest}}}, in LIBERO's order
    within each folder; a folder is a suite's name. "order" lists the names, since JSON of ours sorts keys."""
    raw = read_json(catalogue)
    by_folder: dict[str, list[Task]] = {folder: [] for folder in MAX_STEPS}
    try:
        for name in raw["order"]:
            entry = raw["tasks"][name]
            folder = str(entry["folder"])
            by_folder[folder].append(
                Task(str(name), str(entry["instruction"]), int(entry["initial_states"]), MAX_STEPS[folder])
            )
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise DataError(
            "The list of LIBERO's tasks is damaged",
            file=catalogue,
            found=f"{type(err).__name__}: {err}",
            cure="prts sim install libero",
        ) from err
    tasks = {folder: tuple(found) for folder, found in by_folder.items()}
    tasks["libero_130"] = tuple(task for found in by_folder.values() for task in found)
    return {name: _suite(name, tasks[name], standins) for name in SUITES}


def _suite(name: str, tasks: tuple[Task, ...], standins: str) -> SuiteSpec:
    return SuiteSpec(
        name=name,
        family=FAMILY,
        tasks=tasks,
        contract=contract(),
        settle_steps=10,
        settle_action=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
        image_rotation=180,
        episodes_per_task=50,
        seed=7,
        source=SOURCE,
        standins=standins,
    )
