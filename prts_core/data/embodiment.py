"""Build the Contract from a robot's YAML and a dataset's features: names, units, camera labels.

Widths that disagree are refused here, before any number is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from prts_core.config.model import Compat
from prts_core.config.schema import RobotConfig
from prts_core.contract import Camera, Contract, Dimension
from prts_core.io.errors import ConfigError, ContractError, suggest

# What the public PRTS release calls its numbered cameras.
_NUMBERED = {"image_0": "Camera top", "image_1": "Camera left wrist", "image_2": "Camera right wrist"}


def camera_label(key: str, compat: Compat = "none") -> str:
    """The words a prompt uses for camera `key`: observation.images.cam_high -> "Camera high".

    The words image, images and cam mean camera (whole words only: "camera_x" stays); a name without any of them gets
    the prefix "camera"; underscores become spaces; only the first letter is a capital. compat "prts": the public
    release replaces them inside words too ("camera_front" -> "Cameraera front"), and its checkpoints read that.
    """
    name = key.removeprefix("observation.").removeprefix("images.")
    if name in _NUMBERED:
        return _NUMBERED[name]
    if compat == "prts":
        part = next((part for part in ("image", "cam") if part in name), None)
        name = name.replace(part, "camera") if part else f"camera_{name}"
        return name.replace("_", " ").capitalize()
    words = [
        "camera" if word in ("image", "images", "cam") else word
        for word in name.lower().replace(".", "_").split("_")
        if word
    ]
    if "camera" not in words:
        words.insert(0, "camera")
    return " ".join(words).capitalize()


def build_contract(
    *,
    dataset: str,
    robot: RobotConfig | None,
    robot_type: str | None,
    control_hz: float,
    state: Sequence[str],
    action: Sequence[str],
    cameras: dict[str, tuple[int, int]],
) -> Contract:
    """The Contract of a dataset. cameras: key -> (height, width). state, action: the dataset's names of dimensions, ""
    where it has none. The robot's come first, else numbers stand where the dataset does not name all.

    Raises ContractError where the robot names another number of dimensions than the data has, ConfigError where it
    labels a camera that the data does not have.
    """
    robot_file = f"configs/robots/{robot.embodiment_tag}.yaml" if robot else None
    if robot:
        for key in robot.cameras:
            if key not in cameras:
                raise ConfigError(
                    f"The robot labels a camera that dataset {dataset!r} does not have{suggest(key, cameras)}",
                    file=robot_file,
                    field="cameras",
                    found=key,
                    expected=", ".join(cameras) or "no cameras",
                    cure="correct the key, or remove it",
                )
    labels = robot.cameras if robot else {}
    commands = _dimensions("action", robot, action, dataset, robot_file)
    if robot and robot.relative:
        commands = _relative(commands, robot, dataset, robot_file)
    beyond = [dim.name for dim in commands[len(state) :] if dim.relative]
    if beyond:
        raise ContractError(
            f"A relative action of dataset {dataset!r} has no state to be relative to",
            file=robot_file,
            field="relative",
            found=f"{beyond[0]}: action dimension i is relative to state dimension i; the state has {len(state)}",
            cure="mark it absolute, or put the matching state dimensions first (select_state)",
        )
    return Contract(
        embodiment=robot.embodiment_tag if robot else (robot_type or dataset),
        control_hz=float(control_hz),
        state=_dimensions("state", robot, state, dataset, robot_file),
        action=commands,
        cameras=tuple(
            Camera(key=key, label=labels.get(key) or camera_label(key), height=height, width=width)
            for key, (height, width) in cameras.items()
        ),
        rotation=robot.rotation if robot else "none",
        gripper=robot.gripper if robot else "unknown",
    )


def _dimensions(
    what: Literal["state", "action"], robot: RobotConfig | None, names: Sequence[str], dataset: str, file: str | None
) -> tuple[Dimension, ...]:
    specs, width = getattr(robot, what, ()), len(names)
    if not specs:
        return tuple(Dimension(name if all(names) else f"{what}_{index}") for index, name in enumerate(names))
    if len(specs) != width:
        raise ContractError(
            f"The robot and dataset {dataset!r} disagree on the width of {what}",
            file=file,
            field=what,
            found=f"{len(specs)} dimensions in the robot's YAML, {width} in the data",
            expected="one entry per dimension",
            cure=f"list all {width} dimensions in order, or leave {what} out to take the dataset's own names",
        )
    return tuple(Dimension(spec.name, spec.unit, spec.relative, spec.limits) for spec in specs)


def _relative(
    action: tuple[Dimension, ...], robot: RobotConfig, dataset: str, robot_file: str | None
) -> tuple[Dimension, ...]:
    """The robot's list `relative` laid over dimensions that the dataset names; `truncate` cuts a longer list."""
    flags = robot.relative[: len(action)] if robot.truncate else robot.relative
    if len(flags) != len(action):
        raise ContractError(
            f"The robot and dataset {dataset!r} disagree on the width of action",
            file=robot_file,
            field="relative",
            found=f"{len(robot.relative)} flags in the robot's YAML, {len(action)} dimensions in the data",
            expected="one flag per dimension" + (", or more" if robot.truncate else ""),
            cure="correct the list, choose the columns with select_action, or copy the file under a tag of your own",
        )
    return tuple(replace(dim, relative=flag) for dim, flag in zip(action, flags, strict=True))
