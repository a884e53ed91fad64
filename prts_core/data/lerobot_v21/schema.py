"""Check the JSON side of a LeRobot v2.1 dataset by pydantic: info.json, episodes, tasks, episodes_stats.

One line or one file at a time; laws between files are `prts_core.data.validation.laws`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl

CODEBASE_VERSION = "v2.1"
CHUNKS_SIZE = 1000
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
# What lerobot adds to every dataset, in its order.
STANDARD_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
M = TypeVar("M", bound=BaseModel)


def data_file(episode: int) -> str:
    """Where a table lies in the datasets that we write."""
    return DATA_PATH.format(episode_chunk=episode // CHUNKS_SIZE, episode_index=episode)


def video_file(episode: int, key: str) -> str:
    """Where a camera's video lies in the datasets that we write."""
    return VIDEO_PATH.format(episode_chunk=episode // CHUNKS_SIZE, episode_index=episode, video_key=key)


def totals(lengths: Sequence[int], tasks: int, cameras: int, chunks_size: int = CHUNKS_SIZE) -> dict[str, int]:
    """What info.json counts, of episodes with these rows, in lerobot's order."""
    return {
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "total_tasks": tasks,
        "total_videos": len(lengths) * cameras,
        "total_chunks": -(-len(lengths) // chunks_size),
    }


class _Open(BaseModel):
    """Unknown keys are kept: other writers add their own, and a copy must not lose them."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Feature(_Open):
    """One column or camera. names: None, a list, a nested list or a mapping to lists, as writers please."""

    dtype: str
    shape: tuple[int, ...] = Field(min_length=1)
    names: Any = None
    info: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _pictures_have_sides(self) -> Feature:
        if self.is_image and len(self.shape) not in (2, 3):
            raise ValueError(f"a picture's shape has two or three sides, not {self.shape}")
        return self

    @property
    def is_video(self) -> bool:
        return self.dtype == "video"

    @property
    def is_image(self) -> bool:
        """Pictures, colour or depth; else numbers."""
        return self.dtype in ("video", "image")

    @property
    def is_depth(self) -> bool:
        return self.is_image and bool((self.info or {}).get("video.is_depth_map"))

    @property
    def is_camera(self) -> bool:
        """A colour camera: what a policy may see."""
        return self.is_image and not self.is_depth

    @property
    def flat_names(self) -> list[str] | None:
        """`names` as one flat list: [[a, b]] and {motors: [a, b]} become [a, b]; None where there are none."""

        def walk(node: Any) -> list[str]:
            if isinstance(node, dict):
                return [name for value in node.values() for name in walk(value)]
            if isinstance(node, list | tuple):
                return [name for value in node for name in walk(value)]
            return [] if node is None else [str(node)]

        return walk(self.names) or None

    @property
    def dimension_names(self) -> list[str]:
        """A name for each number of a vector; "" where the names do not fit."""
        names = self.flat_names
        return names if names and len(names) == self.shape[0] else [""] * self.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width), found by names where given: some writers store channels first."""
        names, shape = self.flat_names, self.shape
        if len(shape) == 2:
            return shape[0], shape[1]
        if names and {"height", "width"} <= set(names) and len(names) == len(shape):
            return shape[names.index("height")], shape[names.index("width")]
        return (shape[1], shape[2]) if shape[0] in (1, 3) and shape[-1] not in (1, 3) else (shape[0], shape[1])


class Info(_Open):
    """meta/info.json of v2.1, and where an episode lies; `v30.Info30` is that of v3.0 and v3.1."""

    codebase_version: str
    robot_type: str | None = None
    total_episodes: int = Field(ge=0)
    total_frames: int = Field(ge=0)
    total_tasks: int = Field(ge=0)
    fps: float = Field(gt=0, allow_inf_nan=False)
    splits: dict[str, str] = {}
    data_path: str
    video_path: str | None = None
    features: dict[str, Feature]
    total_videos: int = Field(default=0, ge=0)
    total_chunks: int = Field(default=1, ge=0)
    chunks_size: int = Field(ge=1)
    versions: ClassVar[tuple[str, ...]] = (CODEBASE_VERSION,)
    # What a pattern of paths may name: two numbers and a camera.
    path_fields: ClassVar[tuple[str, str, str]] = ("episode_chunk", "episode_index", "video_key")
    tables: ClassVar[dict[str, str]] = {
        "episodes": "meta/episodes.jsonl",
        "tasks": "meta/tasks.jsonl",
        "episodes_stats": "meta/episodes_stats.jsonl",
    }

    @field_validator("codebase_version")
    @classmethod
    def _one_version(cls, value: str) -> str:
        if value not in cls.versions:
            allowed = " or ".join(map(repr, cls.versions))
            raise ValueError(f"must be {allowed}; lerobot ships converters between its versions")
        return value

    @field_validator("data_path", "video_path")
    @classmethod
    def _stays_inside(cls, value: str | None) -> str | None:
        """A pattern of paths comes from outside: it may name `path_fields` and never leave the dataset's folder."""
        if value is None:
            return value
        for _, name, spec, _ in string.Formatter().parse(value):
            if name is not None and name not in cls.path_fields:
                raise ValueError(f"may use {', '.join(cls.path_fields)} only, not {{{name}}}")
            if spec and not re.fullmatch(r"0?\d?d", spec):
                raise ValueError(f"has a number format that no writer uses: {spec!r}")
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or "\0" in value:
            raise ValueError("must stay inside the dataset's folder")
        value.format(**dict(zip(cls.path_fields, (0, 0, ""), strict=True)))  # ValueError: a number format on a name
        return value

    @field_validator("features")
    @classmethod
    def _plain_names(cls, value: dict[str, Feature]) -> dict[str, Feature]:
        wrong = [key for key in value if "/" in key or "\0" in key or key in ("", ".", "..")]
        if wrong:  # names of cameras become folders
            raise ValueError(f"feature {wrong[0]!r}: names are no paths")
        return value

    @field_validator("splits")
    @classmethod
    def _ranges(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            ends = re.fullmatch(r"\s*([0-9]{1,15})\s*:\s*([0-9]{1,15})\s*", text)
            if ends is None or int(ends[1]) > int(ends[2]):
                raise ValueError(f"split {name!r} must read 'first:end' (end exclusive), not {text!r}")
        return value

    @property
    def video_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.is_video]

    @property
    def split_ranges(self) -> dict[str, range]:
        return {name: range(*(int(part) for part in text.split(":"))) for name, text in self.splits.items()}

    @property
    def camera_keys(self) -> list[str]:
        return [key for key, feature in self.features.items() if feature.is_camera]

    def counted(self, lengths: Sequence[int], tasks: int) -> dict[str, int]:
        """What the totals must be, of episodes with these rows."""
        return totals(lengths, tasks, len(self.video_keys), self.chunks_size)

    def data_file(self, episode: int) -> str:
        """The table with the episode's rows, below the dataset's folder."""
        return self.data_path.format(episode_chunk=episode // self.chunks_size, episode_index=episode)

    def data_rows(self, episode: int) -> range | None:
        """Its rows in that table; none: all."""
        return None

    def data_name(self, episode: int) -> str:
        """`data_file` as messages call it, where a file holds more than one episode."""
        return self.data_file(episode)

    def first_frame(self, episode: int, key: str) -> int | None:
        """Where its frames begin in `video_file`; none: the video is the episode's alone."""
        return None

    def video_name(self, episode: int, key: str) -> str:
        """`video_file` as messages call it."""
        return self.video_file(episode, key)

    def video_file(self, episode: int, key: str) -> str:
        """The video with the episode's frames of one camera."""
        pattern = self.video_path or VIDEO_PATH
        return pattern.format(episode_chunk=episode // self.chunks_size, episode_index=episode, video_key=key)

    def episode_files(self, episode: int) -> list[str]:
        """Relative paths of everything one episode consists of."""
        return [self.data_file(episode), *(self.video_file(episode, key) for key in self.video_keys)]


class Span(_Open):
    """One timed subtask sentence; `end_frame` is exclusive."""

    start_frame: int = Field(ge=0)
    end_frame: int = Field(ge=0)
    action_text: str = Field(min_length=1)


class EpisodeRow(_Open):
    """One line of meta/episodes.jsonl. The optional fields are ours; `action_config` is the public subtask form."""

    episode_index: int = Field(ge=0)
    tasks: list[str] = Field(min_length=1)
    length: int = Field(ge=1)
    action_config: list[dict[str, Any]] | dict[str, Any] | None = None
    seed: int | None = None
    source: dict[str, Any] | None = None
    success_row: int | None = None

    @field_validator("action_config")
    @classmethod
    def _steps_are_objects(cls, value: Any) -> Any:
        steps = value.get("steps", []) if isinstance(value, dict) else []
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise ValueError("steps must be a list of objects")
        return value

    @property
    def spans(self) -> list[Span]:
        """Subtask sentences of either public form; a missing start is the end of the span before it.

        Forms: [{start_frame?, end_frame, action_text}] and {steps: [{end_frame, step_description}]}.
        """
        steps = self.action_config or []
        if isinstance(steps, dict):
            steps = steps.get("steps", [])
        spans, start = [], 0
        for step in steps:
            raw = {"end_frame": step.get("end_frame"), "start_frame": step.get("start_frame", start)}
            spans.append(
                Span.model_validate(raw | {"action_text": step.get("action_text", step.get("step_description"))})
            )
            start = spans[-1].end_frame
        return spans


class TaskRow(_Open):
    """One line of meta/tasks.jsonl."""

    task_index: int = Field(ge=0)
    task: str = Field(min_length=1)


class FeatureSummary(_Open):
    """Statistics of one feature over one episode; images as [[[r]], [[g]], [[b]]] in 0-1."""

    min: list[Any]
    max: list[Any]
    mean: list[Any]
    std: list[Any]
    count: list[int] = Field(min_length=1, max_length=1)


class EpisodeStatsRow(_Open):
    """One line of meta/episodes_stats.jsonl."""

    episode_index: int = Field(ge=0)
    stats: dict[str, FeatureSummary]


Table = Literal["episodes", "tasks", "episodes_stats"]
TABLES: dict[str, type[BaseModel]] = {"episodes": EpisodeRow, "tasks": TaskRow, "episodes_stats": EpisodeStatsRow}


def faults(err: ValidationError) -> list[tuple[str, str, str]]:
    """(field, found, expected) of every fault pydantic saw."""
    return [
        (".".join(str(part) for part in fault["loc"]), f"{fault.get('input')!r:.120}", fault["msg"])
        for fault in err.errors()
    ]


def parse(model: type[M], raw: Any, file: Path, line: int | None = None, version: str = CODEBASE_VERSION) -> M:
    """`raw` as `model`, or a DataError with the first fault."""
    try:
        return model.model_validate(raw)
    except ValidationError as err:
        field, found, expected = faults(err)[0]
        others = len(err.errors()) - 1
        raise DataError(
            f"A metadata file does not fit LeRobot {version}" + (f" ({others} more faults in it)" if others else ""),
            file=file,
            field=field if line is None else f"line {line}, {field}",
            found=found,
            expected=expected,
            cure="correct the file, or write the dataset again with lerobot",
        ) from err


def read_info(root: Path) -> Info:
    """meta/info.json of the dataset at `root`."""
    return parse(Info, read_json(root / "meta" / "info.json"), root / "meta" / "info.json")


def read_table(root: Path, table: Table) -> list[Any]:
    """Rows of meta/<table>.jsonl as their pydantic models."""
    path = root / "meta" / f"{table}.jsonl"
    return [parse(TABLES[table], row, path, number) for number, row in enumerate(read_jsonl(path), 1)]
