"""Raw HDF5 recordings in the robomimic / LIBERO layout become a LeRobot v2.1 dataset; the Contract is born here.

It does not know simulators: `data/demo_<i>` groups with actions, proprioception and camera images are all it needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.embodiment import build_contract
from prts_core.data.lerobot_v21.schema import ACTION, IMAGES, STATE
from prts_core.data.lerobot_v21.writer import Episode, Layout, finish, is_finished, video_feature, write_episode
from prts_core.errors import DataError
from prts_core.progress import track

SPLITS = ("train", "heldout")
_RGB = "_rgb"


@dataclass(frozen=True)
class RawEpisode:
    """Where one demonstration lies and what its attributes say; no arrays."""

    index: int
    start: int
    split: str
    file: str
    demo: str
    length: int
    task: str
    task_index: int
    extra: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.file}:data/{self.demo}"


@dataclass(frozen=True)
class Recording:
    """Everything found in a folder of raw files. cameras: name -> (height, width)."""

    episodes: list[RawEpisode]
    state_width: int
    action_width: int
    cameras: dict[str, tuple[int, int]]
    action_repeat: int | None


def convert(
    raw: Path,
    output: Path,
    state: Path,
    *,
    dataset: str,
    robot: RobotConfig | None,
    control_hz: float,
    video: VideoConfig,
    workers: int = 2,
) -> Contract:
    """Convert <raw>/<split>/*.hdf5 into the LeRobot v2.1 dataset `output`; train episodes come first, then heldout.

    state: folder of resume records; an episode that stands there is not encoded again. The result does not depend on
    `workers`. Raises DataError for recordings that break the layout, ContractError where the robot names other widths.
    """
    recording = scan(raw)
    contract = build_contract(
        dataset=dataset,
        robot=robot,
        robot_type=None,
        control_hz=control_hz,
        state_names=None,
        state_width=recording.state_width,
        action_names=None,
        action_width=recording.action_width,
        cameras={IMAGES + name: size for name, size in recording.cameras.items()},
    )
    layout = Layout(
        root=output,
        state=state,
        features=_features(contract, video),
        fps=control_hz,
        robot_type=contract.embodiment,
        video=video,
    )
    todo = [episode for episode in recording.episodes if not is_finished(layout, episode.index, episode.key)]
    work = _converted(partial(convert_episode, raw, layout), todo, workers)
    for _ in track(work, total=len(todo), what="converting episodes"):
        pass
    finish(layout, len(recording.episodes), _splits(recording.episodes), contract)
    return contract


def _converted(work: Callable[[RawEpisode], None], todo: list[RawEpisode], workers: int) -> Iterator[None]:
    """Run `work` over `todo` in threads: encoders work outside Python's lock, and processes start slowly."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        running = [pool.submit(work, episode) for episode in todo]
        try:
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _features(contract: Contract, video: VideoConfig) -> dict[str, dict[str, Any]]:
    vectors = {STATE: contract.state, ACTION: contract.action}
    return {
        **{
            key: {"dtype": "float32", "shape": [len(dims)], "names": [dim.name for dim in dims]}
            for key, dims in vectors.items()
        },
        **{
            camera.key: video_feature(camera.height, camera.width, contract.control_hz, video)
            for camera in contract.cameras
        },
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
    }


def _splits(episodes: list[RawEpisode]) -> dict[str, range]:
    train = sum(1 for episode in episodes if episode.split == "train")
    splits = {"train": range(0, train), "heldout": range(train, len(episodes))}
    return {name: part for name, part in splits.items() if len(part)}


# ---- reading raw files ---------------------------------------------------------------------------------------------
def scan(raw: Path) -> Recording:
    """List every demonstration under <raw>/<split>/*.hdf5 in their final order, and check that they agree on widths."""
    episodes: list[RawEpisode] = []
    tasks: dict[str, int] = {}
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    repeats: set[int] = set()
    start = 0
    for split in SPLITS:
        for path in sorted((raw / split).glob("*.hdf5")):
            name = path.relative_to(raw).as_posix()
            with _opened(path) as file:
                data = _member(file, "data", path)
                task = _json_attribute(data, "problem_info", path).get("language_instruction")
                if not isinstance(task, str) or not task.strip():
                    raise DataError(
                        "A recording has no instruction",
                        file=path,
                        field="data.problem_info.language_instruction",
                        found=task,
                    )
                repeat = _json_attribute(data, "env_args", path).get("action_repeat")
                repeats |= {int(repeat)} if repeat else set()
                for demo in _demo_names(data, path):
                    length = _check_demo(data[demo], f"data/{demo}", path, shapes)
                    index = len(episodes)
                    number = tasks.setdefault(task, len(tasks))
                    extra = _extra(data[demo], path, name, demo)
                    episodes.append(RawEpisode(index, start, split, name, demo, length, task, number, extra))
                    start += length
    if not any(episode.split == "train" for episode in episodes):
        raise DataError(
            "There are no training recordings to convert",
            file=raw / "train",
            found=f"{len(episodes)} demonstrations",
            expected="*.hdf5 files with demonstrations",
            cure="run `prts collect` first",
        )
    if len(repeats) > 1:
        raise DataError("Recordings differ in action_repeat", file=raw, field="data.env_args", found=sorted(repeats))
    cameras = {
        key.removeprefix("obs/").removesuffix(_RGB): (shape[0], shape[1])
        for key, (shape, _) in shapes.items()
        if key.endswith(_RGB)
    }
    return Recording(
        episodes, shapes["obs/proprio"][0][0], shapes["actions"][0][0], cameras, repeats.pop() if repeats else None
    )


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except OSError as err:
        raise DataError(
            "A recording cannot be read: it is truncated or damaged",
            file=path,
            found=" ".join(str(err).split())[:200],
            expected="a whole HDF5 file",
            cure="delete it and run `prts collect`, which records only what is missing",
        ) from err
    with file:
        yield file


def _member(group: Any, name: str, path: Path) -> Any:
    if name not in group:
        raise DataError(
            "A recording lacks a part of the robomimic layout",
            file=path,
            field=f"{group.name.rstrip('/')}/{name}",
            found=", ".join(group) or "nothing",
            cure="record it again; DESIGN: data/demo_<i>/{actions, obs/proprio, obs/<camera>_rgb}",
        )
    return group[name]


def _json_attribute(group: Any, name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(group.attrs[name])
    except (KeyError, ValueError, TypeError) as err:
        raise DataError(
            "A recording lacks an attribute, or it is not JSON", file=path, field=f"{group.name}.{name}", found=str(err)
        ) from err
    if not isinstance(value, dict):
        raise DataError(
            "An attribute is not a JSON object", file=path, field=f"{group.name}.{name}", found=str(value)[:80]
        )
    return value


def _demo_names(data: Any, path: Path) -> list[str]:
    names = [name for name in data if name.startswith("demo_") and name[5:].isdigit()]
    if not names:
        raise DataError(
            "A recording holds no demonstrations", file=path, field="data", expected="groups demo_0, demo_1, ..."
        )
    return sorted(names, key=lambda name: int(name[5:]))


def _check_demo(demo: Any, where: str, path: Path, shapes: dict[str, tuple[tuple[int, ...], str]]) -> int:
    """Rows of a demonstration; its arrays must have equally many, and the shapes of all demonstrations before it."""
    observations = _member(demo, "obs", path)
    arrays = {"actions": _member(demo, "actions", path), "obs/proprio": _member(observations, "proprio", path)}
    arrays |= {f"obs/{name}": observations[name] for name in sorted(observations) if name.endswith(_RGB)}
    length = int(arrays["actions"].shape[0])
    if length < 1:
        raise DataError("A demonstration is empty", file=path, field=where, found="0 rows", expected="at least 1")
    for key, array in arrays.items():
        if array.shape[0] != length:
            raise DataError(
                "Arrays of a demonstration differ in length",
                file=path,
                field=f"{where}/{key}",
                found=f"{array.shape[0]} rows",
                expected=f"{length} rows, as actions has",
            )
        known, first = shapes.setdefault(key, (array.shape[1:], f"{path.name}:{where}"))
        if array.shape[1:] != known or (key.endswith(_RGB) and (array.ndim != 4 or array.shape[-1] != 3)):
            raise DataError(
                "Demonstrations differ in width",
                file=path,
                field=f"{where}/{key}",
                found=str(array.shape[1:]),
                expected=f"{known}, as in {first}" if array.shape[1:] != known else "(height, width, 3)",
                cure="record all demonstrations with one robot and one camera set",
            )
    missing = {key for key in shapes if key not in arrays}
    if missing:
        raise DataError(
            "A demonstration lacks a camera", file=path, field=f"{where}/{min(missing)}", found=", ".join(arrays)
        )
    return length


def _extra(demo: Any, path: Path, name: str, demo_name: str) -> dict[str, Any]:
    """What episodes.jsonl carries beyond the standard fields."""
    extra: dict[str, Any] = {"source": {"file": name, "demo": demo_name}}
    try:
        if "action_config" in demo.attrs:
            extra["action_config"] = json.loads(demo.attrs["action_config"])
    except ValueError as err:
        raise DataError(
            "Subtasks of a demonstration are not JSON", file=path, field=f"{demo.name}.action_config", found=str(err)
        ) from err
    for key in ("seed", "success_row"):
        if key in demo.attrs:
            extra[key] = int(demo.attrs[key])
    if "expert_noise" in demo.attrs:
        extra["expert_noise"] = float(demo.attrs["expert_noise"])
    return extra


def convert_episode(raw: Path, layout: Layout, episode: RawEpisode) -> None:
    """Read one demonstration and write it as one episode (runs in a worker thread)."""
    path = raw / episode.file
    with _opened(path) as file:
        demo = file[f"data/{episode.demo}"]
        try:
            columns = {STATE: demo["obs/proprio"][:], ACTION: demo["actions"][:]}
            images = {camera: demo[f"obs/{camera.removeprefix(IMAGES)}{_RGB}"][:] for camera in layout.cameras}
        except (OSError, KeyError) as err:
            raise DataError(
                "A demonstration cannot be read", file=path, field=episode.key, found=str(err)[:200]
            ) from err
    for key, values in columns.items():
        columns[key] = _finite(values.astype(np.float32), path, f"data/{episode.demo}", key)
    for camera, frames in images.items():
        if frames.dtype != np.uint8:
            raise DataError(
                "Camera images must be uint8", file=path, field=f"{episode.demo}/{camera}", found=str(frames.dtype)
            )
    success = episode.extra.get("success_row", -1)
    columns["next.success"] = (np.arange(episode.length) >= success) & (success >= 0)
    write_episode(
        layout,
        Episode(
            index=episode.index,
            start=episode.start,
            key=episode.key,
            task=episode.task,
            task_index=episode.task_index,
            columns=columns,
            images=images,
            extra=episode.extra,
        ),
    )


def _finite(values: np.ndarray, path: Path, where: str, key: str) -> np.ndarray:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, *rest = bad[0].tolist()
        raise DataError(
            "A recording holds a number that is not finite",
            file=path,
            field=f"{where}, {key}, row {row}, dimension {rest[0] if rest else 0}",
            found=str(values[tuple(bad[0])]) + (f" ({len(bad)} such values)" if len(bad) > 1 else ""),
            expected="finite numbers",
            cure="delete the file and run `prts collect`, or remove this demonstration",
        )
    return values
