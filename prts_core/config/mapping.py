"""A mapping says what the keys of a recording mean: which become state, action and cameras, in which conventions.

`configs/mappings/<name>.yaml` is checked against these dataclasses by pydantic, once; keys and widths are held against
the recording by `prts_core.data.convert.apply`. Everywhere, `source_*` is the convention as recorded and the plain name
the convention as written; where only the plain name stands, nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.checks import Strict
from prts_core.io.errors import ConfigError

T = TypeVar("T")
# 6d: the first two columns of the matrix (Zhou et al. 2019); matrix: row by row; rpy: roll, pitch, yaw about the fixed
# axes x, y, z in this order, rad; axis-angle: axis times angle, rad, angle in [0, pi].
Rotation = Literal["axis-angle", "quaternion-wxyz", "quaternion-xyzw", "6d", "rpy", "matrix"]
Dtype = Literal["float32", "float64", "int32", "int64", "bool"]


@dataclass(frozen=True)
class Gripper(Strict):
    """The value that means open and the one that means closed; values between them are between."""

    open: float
    closed: float

    def __post_init__(self) -> None:
        if self.open == self.closed:
            raise ValueError("open and closed must be different values")

    def __str__(self) -> str:
        """As robots' YAML says it: "-1 opens, +1 closes"."""
        return f"{_signed(self.open)} opens, {_signed(self.closed)} closes"


def _signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


@dataclass(frozen=True)
class Part(Strict):
    """Some columns of one key, in order. slice: [first, end) of its row; order: single columns (not both).

    names: one per column as written (none: the robot's, else numbers). unit, source_unit: mm becomes m, deg becomes
    rad and so on; unknown pairs are refused. rotation: the columns are one rotation. gripper: one gripper each.
    width: as recorded, refused where the recording differs.
    """

    key: str
    slice: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None
    width: int | None = None
    names: tuple[str, ...] = ()
    unit: str = "unknown"
    source_unit: str | None = None
    rotation: Rotation | None = None
    source_rotation: Rotation | None = None
    gripper: Gripper | None = None
    source_gripper: Gripper | None = None

    def __post_init__(self) -> None:
        if self.slice is not None and self.order is not None:
            raise ValueError("give slice or order, not both")
        if self.slice is not None and not 0 <= self.slice[0] < self.slice[1]:
            raise ValueError("slice is [first, end) with 0 <= first < end")
        for name in ("rotation", "gripper"):
            if getattr(self, f"source_{name}") is not None and getattr(self, name) is None:
                raise ValueError(f"source_{name} says how it was recorded; say with {name} how it is written")
        if self.source_unit is not None and self.unit == "unknown":
            raise ValueError("source_unit says how it was recorded; say with unit how it is written")
        if (self.rotation is not None) and (self.gripper is not None):
            raise ValueError("a part is a rotation or a gripper, not both")


@dataclass(frozen=True)
class CameraPart(Strict):
    """One colour camera. rotate: degrees counter-clockwise. store: video, or image (lossless PNG in the table).

    label: the words of the prompt, where the robot's YAML does not say them.
    """

    key: str
    channels: Literal["rgb", "bgr"] = "rgb"
    rotate: Literal[0, 90, 180, 270] = 0
    store: Literal["video", "image"] = "video"
    label: str | None = None


@dataclass(frozen=True)
class DepthPart(Strict):
    """One depth camera, kept without loss as 16-bit PNG in the table. unit: of one step of the stored number.

    source_unit: of the recorded numbers (floats in m, or integers in mm); 0 means no measurement. A depth beyond
    65535 steps is refused. lerobot's own reader makes int16 of the same bits: beyond 32767 add 65536 to what it shows.
    """

    key: str
    source_unit: Literal["m", "mm", "0.1mm"] = "mm"
    unit: Literal["mm", "0.1mm"] = "mm"
    rotate: Literal[0, 90, 180, 270] = 0


@dataclass(frozen=True)
class ColumnPart(Strict):
    """A further column that the dataset keeps, as recorded: rewards, efforts, success flags."""

    key: str
    dtype: Dtype = "float32"
    slice: tuple[int, int] | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapping(Strict):
    """`configs/mappings/<name>.yaml`.

    source: the kind of recording (prts_core.data.convert.source.SOURCES). embodiment_tag: configs/robots/<tag>.yaml,
    whose names, units and conventions must then agree with what stands here. fps: rows a second; none: the
    recording's own. cameras, depth, columns: feature name -> part; a camera `top` becomes observation.images.top,
    a depth camera `top` observation.depth.top. task: one instruction for every episode; none: the recording's own.
    heldout_episodes: the last so many become the split `heldout`, where the recording has no splits.
    options: what only this kind of source asks for; each source checks its own (`Mapping.options_as`).
    """

    name: str
    source: str
    state: tuple[Part, ...]
    action: tuple[Part, ...]
    cameras: dict[str, CameraPart] = field(default_factory=dict)
    depth: dict[str, DepthPart] = field(default_factory=dict)
    columns: dict[str, ColumnPart] = field(default_factory=dict)
    embodiment_tag: str | None = None
    fps: float | None = None
    task: str | None = None
    heldout_episodes: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.state or not self.action:
            raise ValueError("state and action need at least one part each")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError("fps must be above 0 and at most 1000")
        if self.heldout_episodes < 0:
            raise ValueError("heldout_episodes must not be negative")

    def options_as(self, kind: type[T]) -> T:
        """`options` as the source's own frozen dataclass; a ConfigError for what it does not know."""
        return check(kind, self.options, f"the mapping {self.name}, options")

    @property
    def keys(self) -> set[str]:
        """Every key of the recording that is read."""
        named: tuple[dict[str, Any], ...] = (self.cameras, self.depth, self.columns)
        return {part.key for part in (*self.state, *self.action)} | {p.key for parts in named for p in parts.values()}


def load_mapping(path: Path) -> Mapping:
    """A mapping's YAML, or one ConfigError with every fault of the file."""
    return check_mapping(read_yaml(path), path)


def check_mapping(raw: dict[str, Any], where: object) -> Mapping:
    """The same of a mapping that stands inside another file, `where`."""
    mapping = check(Mapping, raw, where)
    for name in (*mapping.cameras, *mapping.depth, *mapping.columns):
        if not name or any(sign in name for sign in "/\\ \n\t") or name.startswith("."):
            raise ConfigError(
                "A feature's name becomes part of a file name",
                file=where,
                found=name,
                expected="letters, digits, dots, - and _",
            )
    return mapping
