"""Read recordings in the robomimic / LIBERO layout: HDF5 files with groups data/demo_<i>, in a folder or one per split.

Keys are paths below a demonstration (`actions`, `obs/agentview_rgb`, ...), and `success` for whether the attribute
success_row has been reached (false where there is none).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.checks import Strict
from prts_core.config.mapping import CameraPart, ColumnPart, Mapping, Part
from prts_core.data.convert.hdf5 import (
    Hdf5Source,
    Shapes,
    arrays_of,
    json_attribute,
    member,
    opened,
    read_all,
    require_train,
    split_files,
)
from prts_core.data.convert.source import Field, RawEpisode, Recording
from prts_core.io.errors import DataError

SUCCESS = "success"
_LAYOUT = "robomimic"
_RGB = "_rgb"


@dataclass(frozen=True)
class Options(Strict):
    """filter: only demonstrations of this group under `mask`, as robomimic names its own splits."""

    filter: str | None = None


class Source(Hdf5Source):
    """See prts_core.data.convert.source.Source."""

    options_type: type = Options

    def scan(self) -> Recording:
        self.rates: set[float] = set()
        recording = super().scan()
        if len(self.rates) > 1:
            raise DataError(
                "Recordings differ in control rate", file=self.path, field="data.env_args", found=sorted(self.rates)
            )
        return replace(recording, fps=next(iter(self.rates), None))

    def episodes(self, file: Any, path: Path, split: str, shapes: Shapes) -> Iterator[RawEpisode]:
        data = member(file, "data", path, _LAYOUT)
        environment = json_attribute(data, "env_args", path) if "env_args" in data.attrs else {}
        rate = (environment.get("env_kwargs") or {}).get("control_freq", environment.get("control_hz"))
        if isinstance(rate, int | float) and rate:
            self.rates.add(float(rate))
        task = self._task(data, path)
        for demo in self.chosen(file, data, path):
            yield self._episode(data[demo], demo, path, split, task, shapes)

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        name, demo_name = episode.where
        path = self.file(name)
        with opened(path) as file:
            demo = file[f"data/{demo_name}"]
            arrays = {key: read_all(demo[key], path, f"{episode.key}/{key}") for key in keys if key != SUCCESS}
        return arrays | ({SUCCESS: reached(episode)} if SUCCESS in keys else {})

    def chosen(self, file: Any, data: Any, path: Path) -> list[str]:
        """Names of the demonstrations of one file that are converted, in order."""
        names = demo_names(data, path)
        if self.options.filter is None:
            return names
        mask = member(member(file, "mask", path, _LAYOUT), self.options.filter, path, _LAYOUT)
        wanted = {name.decode() if isinstance(name, bytes) else str(name) for name in mask[:]}
        return [name for name in names if name in wanted]

    def extra(self, demo: Any, path: Path, file: str, name: str) -> dict[str, Any]:
        """What episodes.jsonl carries beyond the standard fields."""
        return demo_extra(demo, path, file, name)

    def _episode(self, demo: Any, name: str, path: Path, split: str, task: str, shapes: Shapes) -> RawEpisode:
        where, file = f"data/{name}", self.name(path)
        member(demo, "actions", path, _LAYOUT)
        arrays = {key: array for key, array in arrays_of(demo).items() if array.ndim}
        fields = {key: Field(str(array.dtype), array.shape[1:]) for key, array in arrays.items()}
        rows = {key: int(array.shape[0]) for key, array in arrays.items()}
        fields[SUCCESS], rows[SUCCESS] = Field("bool", ()), rows["actions"]
        return RawEpisode(
            key=f"{file}:{where}",
            length=shapes.add(fields, rows, path, where, "actions"),
            task=self.mapping.task or str(demo.attrs.get("instruction", task)),
            split=split,
            extra=self.extra(demo, path, file, name),
            files=self.files(file),
            where=(file, name),
        )

    def _task(self, data: Any, path: Path) -> str:
        if self.mapping.task is not None:
            return self.mapping.task
        task = json_attribute(data, "problem_info", path).get("language_instruction")
        if not isinstance(task, str) or not task.strip():
            raise DataError(
                "A recording has no instruction",
                file=path,
                field="data.problem_info.language_instruction",
                found=task,
                cure="say it with `task` in the mapping",
            )
        return task


def native_mapping(path: Path, name: str, fps: float | None = None) -> Mapping:
    """The mapping of recordings that name their parts as `prts collect` does: obs/proprio, actions, obs/<camera>_rgb,
    taken from the first demonstration; the rest must have the same."""
    files = split_files(path)
    require_train([split for split, _ in files], path)
    with opened(files[0][1]) as file:
        data = member(file, "data", files[0][1], _LAYOUT)
        demo = data[demo_names(data, files[0][1])[0]]
        cameras = [key for key in arrays_of(demo) if key.startswith("obs/") and key.endswith(_RGB)]
    return Mapping(
        name=name,
        source="robomimic",
        state=(Part("obs/proprio"),),
        action=(Part("actions"),),
        cameras={key.removeprefix("obs/").removesuffix(_RGB): CameraPart(key) for key in cameras},
        columns={"next.success": ColumnPart(SUCCESS, "bool")},
        fps=fps,
    )


def demo_names(data: Any, path: Path) -> list[str]:
    names = [name for name in data if name.startswith("demo_") and name[5:].isdigit()]
    if not names:
        raise DataError(
            "A recording holds no demonstrations", file=path, field="data", expected="groups demo_0, demo_1, ..."
        )
    return sorted(names, key=lambda name: int(name[5:]))


def demo_extra(demo: Any, path: Path, file: str, name: str) -> dict[str, Any]:
    """What episodes.jsonl carries beyond the standard fields."""
    extra: dict[str, Any] = {"source": {"file": file, "demo": name}}
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


def reached(episode: RawEpisode) -> np.ndarray:
    """(T,) bool: has the row been reached at which the task was first done?"""
    row = episode.extra.get("success_row", -1)
    return (np.arange(episode.length) >= row) & (row >= 0)
