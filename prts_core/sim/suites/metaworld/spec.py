"""Meta-World's suites as data: the quickstart's tasks under the quickstart's protocol. It imports no simulator.

The numbers are those of configs/datasets/metaworld.yaml and configs/robots/metaworld_sawyer.yaml, which a test
compares; the worker process that reads this file has no YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prts_core.contract import Camera, Contract, Dimension
from prts_core.io.errors import ConfigError
from prts_core.sim.suite import SuiteSpec, Task

SIMULATOR_HZ = 80.0  # 5 physics steps of 2.5 ms
ACTION_REPEAT = 2  # simulator steps (80 a second) that one action is held
START_JITTER = 14  # centimetres that the hand starts off its place, at most
IMAGE_SIZE = 64

CONTRACT = Contract(
    embodiment="metaworld_sawyer",
    control_hz=SIMULATOR_HZ / ACTION_REPEAT,
    state=(
        Dimension("hand_x", "m"),
        Dimension("hand_y", "m"),
        Dimension("hand_z", "m"),
        Dimension("gripper_opening", "1"),
    ),
    action=(
        Dimension("hand_dx", "cm per simulator step"),
        Dimension("hand_dy", "cm per simulator step"),
        Dimension("hand_dz", "cm per simulator step"),
        Dimension("gripper_effort", "1"),
    ),
    cameras=(
        Camera("observation.images.top", "Camera top", IMAGE_SIZE, IMAGE_SIZE),
        Camera("observation.images.wrist", "Camera wrist", IMAGE_SIZE, IMAGE_SIZE),
    ),
    rotation="none",
    gripper="-1 opens, +1 closes",
)
# (task, sentence, simulator steps: twice the expert's mean)
_TASKS = (
    ("faucet-open", "open the faucet", 116),
    ("faucet-close", "close the faucet", 124),
    ("window-open", "open the window", 168),
    ("window-close", "close the window", 168),
    ("button-press-topdown", "press the button", 128),
    ("button-press-topdown-wall", "press the walled button", 112),
)


def suites() -> dict[str, SuiteSpec]:
    """A reset draws the scene from seed + initial_state, so that initial states 0, 1, 2, ... of the suite's seed are
    the episodes of the quickstart's benchmark."""
    return suites_for({})


def suites_for(settings: Mapping[str, Any]) -> dict[str, SuiteSpec]:
    """The suite as a dataset of other settings was recorded; none: as it is.

    settings: `image_size` (pixels), `action_repeat` (simulator steps), `start_jitter` (cm) and `tasks`, a list of
    [name, sentence, simulator steps]. ConfigError for anything else.
    """
    numbers = {"image_size": IMAGE_SIZE, "action_repeat": ACTION_REPEAT, "start_jitter": START_JITTER}
    unknown = sorted(set(settings) - {*numbers, "tasks"})
    if unknown:
        raise ConfigError(
            "Meta-World has no such setting",
            field="settings",
            found=unknown[0],
            expected=", ".join([*numbers, "tasks"]),
        )
    for name, least in (("image_size", 16), ("action_repeat", 1), ("start_jitter", 0)):
        numbers[name] = settings.get(name, numbers[name])
        if type(numbers[name]) is not int or numbers[name] < least:
            raise ConfigError(
                "Not a setting of Meta-World", field=name, found=numbers[name], expected=f"{least} or more"
            )
    size, repeat = numbers["image_size"], numbers["action_repeat"]
    jitter = numbers["start_jitter"]
    cameras = tuple(replace(camera, height=size, width=size) for camera in CONTRACT.cameras)
    tasks: Sequence[Any] = settings.get("tasks", _TASKS)
    return {
        "metaworld": SuiteSpec(
            name="metaworld",
            family="metaworld",
            tasks=tuple(Task(name, text, 0, steps // repeat) for name, text, steps in tasks),
            contract=replace(CONTRACT, control_hz=SIMULATOR_HZ / repeat, cameras=cameras),
            settle_steps=0,
            settle_action=(0.0, 0.0, 0.0, -1.0),
            image_rotation=0,
            episodes_per_task=50,
            seed=90_000,
            source="Meta-World 3.1.1 (Yu et al. 2019, arXiv:1910.10897); protocol of configs/quickstart.yaml"
            + ("" if jitter == START_JITTER else f", but starts up to {jitter} cm off"),
        )
    }
