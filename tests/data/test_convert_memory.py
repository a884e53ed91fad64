"""Memory of every converter is that of one episode a worker: ten times the recording takes no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from prts_core.config.mapping import CameraPart, Mapping, Part
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.convert.run import convert
from tests.data import test_convert_mcap as mcap
from tests.data import test_convert_rlds as rlds
from tests.data.test_convert_killed import from_v30, mapped, to_v30

ROWS, SIDE = 40, 192
EPISODE_MB = ROWS * SIDE * SIDE * 3 / 1e6  # one camera, decoded
CODE = """
import pathlib, resource, sys, threading, time
from tests.data.test_convert_memory import RUN
kind, few, many, folder = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
RUN[kind](few, folder / "warm", 1)  # what is imported and allocated once is no episode
start = peak = resident()
over = threading.Event()
def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, resident())
threading.Thread(target=watch, daemon=True).start()
for root in (few, many):
    RUN[kind](root, folder / root.parent.name, 1)
    print((peak - start) / 1e6)
"""


def moving(number: int) -> np.ndarray:
    """(ROWS, SIDE, SIDE, 3) uint8 that every codec packs well: what is measured is memory, not time."""
    base = np.random.default_rng(number).integers(0, 200, (4, 4, 3), dtype=np.uint8)
    still = base.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)
    return np.stack([np.roll(still, 4 * row, 1) for row in range(ROWS)])


def record_hdf5(root: Path, count: int) -> None:
    root.mkdir()
    with h5py.File(root / "x_demo.hdf5", "w") as file:
        for number in range(count):
            demo = file.create_group(f"data/demo_{number}")
            demo["actions"] = np.random.default_rng(number).normal(size=(ROWS, 4)).astype(np.float32)
            demo.create_dataset("top", data=moving(number), chunks=(1, SIDE, SIDE, 3), compression="gzip")


def record_rlds(root: Path, count: int) -> None:
    def episode(number: int, rows: int) -> dict:
        return {
            "steps/action": np.random.default_rng(number).normal(size=(rows, 3)).astype(np.float32),
            "steps/observation/wrist": [rlds.packed(image, "JPEG") for image in moving(number)[:rows]],
            "steps/language_instruction": [b"do it"] * rows,
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlds, "episode", episode)
        rlds.write_rlds(root, lengths=(ROWS,) * count)


def record_mcap(root: Path, count: int) -> None:
    kind = "sensor_msgs/msg/CompressedImage"
    for number in range(count):
        content: list[mcap.Message] = []
        for row, image in enumerate(moving(number)):
            time = mcap.T0 + row * mcap.SECOND // 20
            head = {"header": mcap.stamped(time)}
            content.append(("/top", kind, time, head | {"format": "png", "data": mcap.png(image)}))
            joints = {"name": ["a"], "position": [row / 9], "velocity": [], "effort": []}
            content.append(("/joints", "sensor_msgs/msg/JointState", time, head | joints))
        mcap.write_ros2(root / f"{number}.mcap", content)


def record_v21(root: Path, count: int) -> None:
    record_hdf5(root.parent / "hdf5", count)
    convert(
        root.parent / "hdf5",
        root,
        root.parent / "work",
        mapping=MAPPINGS["hdf5"],
        dataset="m",
        robot=None,
        video=VideoConfig(),
    )


def record_v30(root: Path, count: int) -> None:
    record_v21(root.parent / "v21", count)
    export(root.parent / "v21", root, root.parent / "v30_work")


def mapping(source: str, number: str, camera: str) -> Mapping:
    part = (Part(number),)
    return Mapping("m", source, part, part, {"top": CameraPart(camera)}, fps=20.0, task="do it")


MAPPINGS = {
    "hdf5": mapping("robomimic", "actions", "top"),
    "rlds": mapping("rlds", "action", "observation/wrist"),
    "mcap": mapping("mcap", "/joints:position", "/top"),
}
RUN = {kind: lambda *args, made=made: mapped(made, *args) for kind, made in MAPPINGS.items()}
RUN |= {"v2.1 to v3.0": to_v30, "v3.0 to v2.1": from_v30}
RECORD = {
    "hdf5": record_hdf5,
    "rlds": record_rlds,
    "mcap": record_mcap,
    "v2.1 to v3.0": record_v21,
    "v3.0 to v2.1": record_v30,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUN)
def test_ten_times_the_recording_takes_the_same_memory(tmp_path: Path, kind: str) -> None:
    for count in (2, 20):
        (tmp_path / str(count)).mkdir()
        RECORD[kind](tmp_path / str(count) / "recording", count)
    # One arena: freed memory of several threads' arenas, kept by the allocator, is no memory that an episode needs.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
        "MALLOC_ARENA_MAX": "1",
    }
    folders = (tmp_path / "2/recording", tmp_path / "20/recording", tmp_path / "made")
    command = [sys.executable, "-c", CODE, kind, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [float(line) for line in done.stdout.split()]
    print(f"{kind}: {peaks[0]:.1f} MB for 2 episodes, {peaks[1]:.1f} MB for 20")
    assert peaks[1] < peaks[0] + 5 * EPISODE_MB, f"{peaks} MB; 18 more episodes are {18 * EPISODE_MB:.0f} MB decoded"
