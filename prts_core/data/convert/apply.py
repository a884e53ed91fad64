"""Apply a mapping to a recording: its Contract and features once, then the columns and images of each episode.

Everything that does not fit (keys, widths, dtypes, units) is refused in one error before any number is read; numbers
that contradict their convention are refused with their row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.mapping import CameraPart, DepthPart, Mapping, Part
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Camera, Contract, Dimension
from prts_core.data.convert.conventions import (
    ROTATION_WIDTH,
    ConventionError,
    convert_gripper,
    convert_rotation,
    known_units,
    unit_factor,
)
from prts_core.data.convert.source import Field, RawEpisode, Recording
from prts_core.data.embodiment import build_contract
from prts_core.data.lerobot_v21.schema import ACTION, IMAGES, STANDARD_FEATURES, STATE
from prts_core.data.lerobot_v21.writer import depth_feature, image_feature, video_feature
from prts_core.io.errors import ContractError, DataError, suggest

DEPTH = "observation.depth."
_DEPTH_STEPS = {"m": 1.0, "mm": 1e-3, "0.1mm": 1e-4}  # metres
_DEPTH_MAX = np.iinfo(np.uint16).max


@dataclass(frozen=True)
class ConversionPlan:
    """A mapping that fits a recording. features: info.json's, without the standard ones, in order."""

    mapping: Mapping
    contract: Contract
    features: dict[str, dict[str, Any]]


def apply_mapping(
    mapping: Mapping, recording: Recording, *, root: Path, dataset: str, robot: RobotConfig | None, video: VideoConfig
) -> ConversionPlan:
    """Hold a mapping against what a recording has. Raises DataError with every fault, ContractError where robot and
    mapping say different things."""
    faults = _faults(mapping, recording.fields)
    fps = mapping.fps or recording.fps
    if fps is None:
        faults.append("fps: the recording does not say its rate, so the mapping must")
    if faults:
        raise DataError(
            f"The mapping {mapping.name!r} does not fit the recording",
            file=root,
            field=faults[0].partition(":")[0],
            found="; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else ""),
            expected="of the recording: "
            + (", ".join(f"{key} {spec}" for key, spec in sorted(recording.fields.items())) or "no keys"),
            cure="correct these entries of the mapping (configs/mappings/)",
        )
    assert fps is not None
    contract = _contract(mapping, recording, fps, dataset, robot)
    return ConversionPlan(mapping, contract, _features(mapping, contract, recording.fields, video))


# ---- does it fit -------------------------------------------------------------------------------------------------
def _faults(mapping: Mapping, fields: dict[str, Field]) -> list[str]:
    faults: list[str] = []

    def known(where: str, key: str) -> Field | None:
        if key not in fields:
            faults.append(f"{where}: no key {key!r}{suggest(key, fields)}")
        return fields.get(key)

    for what, parts in (("state", mapping.state), ("action", mapping.action)):
        for number, part in enumerate(parts):
            where = f"{what}[{number}]"
            if (spec := known(where, part.key)) is not None:
                faults += [f"{where}: {fault}" for fault in _part_faults(part, spec)]
    for name, camera in mapping.cameras.items():
        where = f"cameras.{name}"
        if (spec := known(where, camera.key)) is not None and (
            len(spec.shape) != 3 or spec.shape[-1] != 3 or spec.dtype != "uint8"
        ):
            faults.append(f"{where}: {IMAGES}{name} needs uint8[height, width, 3], and {camera.key} is {spec}")
    for name, depth in mapping.depth.items():
        where = f"depth.{name}"
        if (spec := known(where, depth.key)) is None:
            continue
        plain = spec.shape[:-1] if len(spec.shape) == 3 and spec.shape[-1] == 1 else spec.shape
        if len(plain) != 2 or np.dtype(spec.dtype).kind not in "fu":
            faults.append(f"{where}: depth needs numbers[height, width], and {depth.key} is {spec}")
    for name, column in mapping.columns.items():
        where = f"columns.{name}"
        if name in STANDARD_FEATURES or name in (STATE, ACTION) or name.startswith((IMAGES, DEPTH)):
            faults.append(f"{where}: this name belongs to the dataset itself; choose another")
        elif (spec := known(where, column.key)) is not None:
            faults += [
                f"{where}: {f}" for f in _part_faults(Part(column.key, slice=column.slice, names=column.names), spec)
            ]
    return faults


def _part_faults(part: Part, spec: Field) -> list[str]:
    if len(spec.shape) > 1 or np.dtype(spec.dtype).kind not in "fiub":
        return [f"numbers[width] are needed, and {part.key} is {spec}"]
    width = spec.shape[0] if spec.shape else 1
    if part.width is not None and part.width != width:
        return [f"{part.key} is {width} wide, and the mapping says {part.width}"]
    if part.slice is not None and part.slice[1] > width:
        return [f"{part.key} is {width} wide, and slice {list(part.slice)} goes beyond"]
    if part.order is not None and not all(0 <= column < width for column in part.order):
        return [f"{part.key} is {width} wide, and order {list(part.order)} goes beyond"]
    faults = []
    taken = recorded_width(part, width)
    if part.rotation is not None:
        source = part.source_rotation or part.rotation
        if taken != ROTATION_WIDTH[source]:
            faults.append(f"{source} has {ROTATION_WIDTH[source]} numbers, and {taken} of {part.key} are taken")
    if part.source_unit is not None and unit_factor(part.source_unit, part.unit) is None:
        faults.append(f"{part.source_unit!r} cannot become {part.unit!r}; known units: {known_units()}")
    written = written_width(part, width)
    if part.names and len(part.names) != written:
        faults.append(f"{len(part.names)} names for {written} numbers")
    return faults


def recorded_width(part: Part, width: int) -> int:
    """Columns that a part takes from a row of `width`."""
    if part.slice is not None:
        return part.slice[1] - part.slice[0]
    return len(part.order) if part.order is not None else width


def written_width(part: Part, width: int) -> int:
    return ROTATION_WIDTH[part.rotation] if part.rotation is not None else recorded_width(part, width)


# ---- what is written ---------------------------------------------------------------------------------------------
def _contract(mapping: Mapping, recording: Recording, fps: float, dataset: str, robot: RobotConfig | None) -> Contract:
    stated = {
        "state": _dimensions(mapping.state, recording.fields),
        "action": _dimensions(mapping.action, recording.fields),
    }
    contract = build_contract(
        dataset=dataset,
        robot=robot,
        robot_type=mapping.embodiment_tag or recording.robot_type,
        control_hz=fps,
        state=[dim.name for dim in stated["state"]],
        action=[dim.name for dim in stated["action"]],
        cameras={IMAGES + name: _turned(recording.fields[part.key], part) for name, part in mapping.cameras.items()},
    )
    cameras = tuple(_label(camera, mapping, robot) for camera in contract.cameras)
    return replace(
        contract,
        state=_agreed("state", stated["state"], contract.state, robot),
        action=_agreed("action", stated["action"], contract.action, robot),
        cameras=cameras,
        rotation=_convention("rotation", mapping, robot.rotation if robot else "none", "none"),
        gripper=_convention("gripper", mapping, robot.gripper if robot else "unknown", "unknown"),
    )


def _dimensions(parts: Sequence[Part], fields: dict[str, Field]) -> list[Dimension]:
    """One per written number; a name is "" where the mapping gives none."""
    out = []
    for part in parts:
        shape = fields[part.key].shape
        width = written_width(part, shape[0] if shape else 1)
        out += [Dimension(name, part.unit) for name in part.names or [""] * width]
    return out


def _agreed(
    what: str, stated: list[Dimension], built: tuple[Dimension, ...], robot: RobotConfig | None
) -> tuple[Dimension, ...]:
    """The contract's dimensions with the mapping's units where the robot gives none; a contradiction is refused."""
    out = []
    for index, (mapped, robots) in enumerate(zip(stated, built, strict=True)):
        for part, unknown in (("name", ""), ("unit", "unknown")):
            mine, other = getattr(mapped, part), getattr(robots, part)
            if robot is not None and getattr(robot, what) and unknown not in (mine, other) and mine != other:
                raise _contradiction(f"{what}[{index}].{part}", mine, other, robot)
        out.append(replace(robots, unit=mapped.unit if robots.unit == "unknown" else robots.unit))
    return tuple(out)


def _convention(what: str, mapping: Mapping, robots: str, unknown: str) -> str:
    """What the contract says of rotations or of the action's gripper: the mapping's word, the robot's, or both."""
    parts = mapping.action if what == "gripper" else (*mapping.action, *mapping.state)
    stated = sorted({str(value) for part in parts if (value := getattr(part, what)) is not None})
    if stated and robots != unknown and stated != [robots]:
        raise _contradiction(what, ", ".join(stated), robots, None)
    return ", ".join(stated) if stated else robots


def _contradiction(where: str, mine: str, other: str, robot: RobotConfig | None) -> ContractError:
    return ContractError(
        "A mapping and its robot say different things of the same numbers",
        file=f"configs/robots/{robot.embodiment_tag}.yaml" if robot else None,
        field=where,
        found=f"{mine!r} in the mapping, {other!r} in the robot's YAML",
        expected="one meaning",
        cure="correct one of them, or convert with source_unit, source_rotation or source_gripper",
    )


def _label(camera: Camera, mapping: Mapping, robot: RobotConfig | None) -> Camera:
    label = mapping.cameras[camera.key.removeprefix(IMAGES)].label
    return camera if label is None or (robot and camera.key in robot.cameras) else replace(camera, label=label)


def _turned(spec: Field, part: CameraPart | DepthPart) -> tuple[int, int]:
    """(height, width) as written."""
    height, width = spec.shape[:2]
    return (width, height) if part.rotate in (90, 270) else (height, width)


def _features(
    mapping: Mapping, contract: Contract, fields: dict[str, Field], video: VideoConfig
) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        key: {"dtype": "float32", "shape": [len(dims)], "names": [dim.name for dim in dims]}
        for key, dims in ((STATE, contract.state), (ACTION, contract.action))
    }
    for name, part in mapping.cameras.items():
        height, width = _turned(fields[part.key], part)
        as_video = part.store == "video"
        features[IMAGES + name] = (
            video_feature(height, width, contract.control_hz, video) if as_video else image_feature(height, width)
        )
    for name, deep in mapping.depth.items():
        features[DEPTH + name] = depth_feature(*_turned(fields[deep.key], deep), deep.unit)
    for name, column in mapping.columns.items():
        shape = fields[column.key].shape
        width = recorded_width(Part(column.key, slice=column.slice), shape[0] if shape else 1)
        features[name] = {"dtype": column.dtype, "shape": [width], "names": list(column.names) or None}
    return features


# ---- one episode -------------------------------------------------------------------------------------------------
def columns_and_images(
    plan: ConversionPlan, episode: RawEpisode, arrays: dict[str, np.ndarray], root: Path
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """({feature: (T, D) or (T,)}, {camera: (T, H, W, 3) uint8, depth camera: (T, H, W) uint16}) of one episode."""
    file = root / episode.files[0] if episode.files else root
    mapping = plan.mapping
    for key in sorted(mapping.keys):
        if len(arrays[key]) != episode.length:
            found, expected = f"{len(arrays[key])} rows", f"{episode.length} rows"
            problem, field = "Arrays of an episode differ in length", f"{episode.key}, {key}"
            raise DataError(problem, file=file, field=field, found=found, expected=expected)
    columns = {
        STATE: np.concatenate([_vector(part, arrays[part.key], file, episode) for part in mapping.state], axis=1),
        ACTION: np.concatenate([_vector(part, arrays[part.key], file, episode) for part in mapping.action], axis=1),
    }
    for name, column in mapping.columns.items():
        values = _chosen(Part(column.key, slice=column.slice), arrays[column.key])
        values = _finite(values, file, f"{episode.key}, {column.key}").astype(column.dtype)
        columns[name] = values[:, 0] if values.shape[1] == 1 else values
    images = {IMAGES + name: _picture(part, arrays[part.key]) for name, part in mapping.cameras.items()}
    for name, deep in mapping.depth.items():
        images[DEPTH + name] = _depth(deep, arrays[deep.key], file, f"{episode.key}, {deep.key}")
    return columns, images


def _chosen(part: Part, values: np.ndarray) -> np.ndarray:
    values = values.reshape(len(values), -1)
    if part.slice is not None:
        return values[:, part.slice[0] : part.slice[1]]
    return values[:, list(part.order)] if part.order is not None else values


def _vector(part: Part, values: np.ndarray, file: Path, episode: RawEpisode) -> np.ndarray:
    """(T, written width) float32 of one part."""
    where = f"{episode.key}, {part.key}"
    values = _chosen(part, _finite(values, file, where))
    if part.source_unit is not None:
        factor = unit_factor(part.source_unit, part.unit)
        assert factor is not None, "fit() refuses units that do not convert"
        values = values.astype(np.float64) * factor if factor != 1.0 else values
    try:
        if part.rotation is not None:
            values = convert_rotation(values, part.source_rotation or part.rotation, part.rotation)
        if part.gripper is not None:
            values = convert_gripper(values, part.source_gripper or part.gripper, part.gripper)
    except ConventionError as err:
        raise DataError(
            "A recording contradicts the convention that its mapping names",
            file=file,
            field=f"{where}, row {err.row}",
            found=err.found,
            expected=err.expected,
            cure="correct the convention in the mapping, or leave this episode out of the recording",
        ) from err
    return values.astype(np.float32)


def _finite(values: np.ndarray, file: Path, where: str) -> np.ndarray:
    bad = np.argwhere(~np.isfinite(values.astype(np.float32))) if values.dtype.kind == "f" else np.zeros((0, 1), int)
    if len(bad):
        row, *rest = bad[0].tolist()
        raise DataError(
            "A recording holds a number that is not finite",
            file=file,
            field=f"{where}, row {row}, dimension {rest[0] if rest else 0}",
            found=str(values[tuple(bad[0])]) + (f" ({len(bad)} such values)" if len(bad) > 1 else ""),
            expected="finite numbers",
            cure="delete the file and record it again, or remove this episode",
        )
    return values


def _picture(part: CameraPart, frames: np.ndarray) -> np.ndarray:
    frames = frames[..., ::-1] if part.channels == "bgr" else frames
    return np.rot90(frames, part.rotate // 90, axes=(1, 2)) if part.rotate else frames


def _depth(part: DepthPart, values: np.ndarray, file: Path, where: str) -> np.ndarray:
    """(T, H, W) uint16 steps of part.unit; not-a-number means no measurement, as 0 does."""
    values = values[..., 0] if values.ndim == 4 else values
    factor = _DEPTH_STEPS[part.source_unit] / _DEPTH_STEPS[part.unit]
    out = np.empty(values.shape, np.uint16)
    for row, picture in enumerate(values):  # one at a time: an episode in float64 would be four times its size
        if picture.dtype.kind == "f" or factor != 1.0:
            picture = np.rint(np.nan_to_num(picture.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) * factor)
        if picture.min() < 0 or picture.max() > _DEPTH_MAX:
            raise DataError(
                "A depth picture does not fit 16 bits",
                file=file,
                field=f"{where}, row {row}",
                found=f"{picture.min():g} to {picture.max():g} {part.unit}",
                expected=f"0 to {_DEPTH_MAX} {part.unit}",
                cure="choose unit: mm, or correct source_unit in the mapping",
            )
        out[row] = picture
    return np.rot90(out, part.rotate // 90, axes=(1, 2)) if part.rotate else out
