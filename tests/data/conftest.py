"""Tiny synthetic recordings and datasets for the data room's tests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

from prts_core.config.schema import DimensionSpec, RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert

ROBOT = RobotConfig(
    embodiment_tag="toy",
    state=tuple(DimensionSpec(name, "m") for name in ("x", "y", "z", "grip")),
    action=tuple(DimensionSpec(name, "cm") for name in ("dx", "dy", "dz", "effort")),
    cameras={"observation.images.top": "Camera top"},
)


def write_raw(
    folder: Path,
    tasks: dict[str, str] | None = None,
    *,
    train: int = 2,
    heldout: int = 1,
    rows: int = 12,
    size: int = 32,
    seed: int = 0,
) -> Path:
    """Raw recordings in the layout that collect writes: <folder>/<split>/<task>_demo.hdf5, smooth moving squares.

    tasks: name -> instruction. Episode lengths vary from `rows` to `rows` + 2. Same arguments, same content.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("heldout", heldout)):
        for task, instruction in (tasks or {"faucet-open": "open the faucet", "dial-turn": "turn the dial"}).items():
            path = folder / split / f"{task}_demo.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                data = file.create_group("data")
                data.attrs["env_args"] = json.dumps({"env_name": task, "control_hz": 20.0})
                data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
                data.attrs["num_demos"], data.attrs["total"] = count, 0
                for number in range(count):
                    _write_demo(data.create_group(f"demo_{number}"), rng, rows + number % 3, size)
    return folder


def _write_demo(demo: h5py.Group, rng: np.random.Generator, rows: int, size: int) -> None:
    demo["actions"] = rng.normal(size=(rows, 4)).astype(np.float32)
    demo["executed_actions"] = demo["actions"][:]
    demo["rewards"] = np.zeros(rows, np.float32)
    demo["dones"] = np.zeros(rows, np.uint8)
    demo["states"] = rng.normal(size=(rows, 9))
    demo["obs/proprio"] = np.cumsum(rng.normal(size=(rows, 4)), 0).astype(np.float32)
    for camera in ("top", "wrist"):
        background = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8).repeat(size // 4, 0).repeat(size // 4, 1)
        frames = np.stack([background] * rows)
        for row in range(rows):
            frames[row, size // 2 :, row % size : row % size + 6] = 255
        demo.create_dataset(f"obs/{camera}_rgb", data=frames, chunks=(1, size, size, 3), compression="gzip")
    demo.attrs["num_samples"], demo.attrs["seed"] = rows, int(rng.integers(1 << 20))
    demo.attrs["expert_noise"], demo.attrs["success_row"] = 0.2, rows - 3
    half = rows // 2
    demo.attrs["action_config"] = json.dumps(
        [
            {"start_frame": 0, "end_frame": half, "action_text": "reach it"},
            {"start_frame": half, "end_frame": rows, "action_text": "turn it"},
        ]
    )


@dataclass(frozen=True)
class Converted:
    raw: Path
    root: Path
    contract: Contract


def convert_toy(folder: Path, raw: Path, workers: int = 1, **options: object) -> Converted:
    """`raw` converted into <folder>/output with the toy robot at 20 Hz."""
    settings = {"dataset": "toy", "robot": ROBOT, "video": VideoConfig()} | options
    mapping = native_mapping(raw, "toy", 20.0)
    contract = convert(raw, folder / "output", folder / "episodes", mapping=mapping, workers=workers, **settings)  # type: ignore[arg-type]
    return Converted(raw, folder / "output", contract)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A converted dataset of 2 tasks, 4 train and 2 heldout episodes. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("toy")
    return convert_toy(folder, write_raw(folder / "raw"))
