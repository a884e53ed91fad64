"""Open a LeRobot dataset of v2.1, v3.0 or v3.1 and read its columns and frames as numpy arrays.

Laws of the format are checked by `prts_core.data.validation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from prts_core.contract import Contract
from prts_core.data.images import opened_picture, resize_for_model
from prts_core.data.lerobot_v21.remote import mirror, remote_of
from prts_core.data.lerobot_v21.schema import ACTION, STATE, EpisodeRow, EpisodeStatsRow, Info, read_info, read_table
from prts_core.data.lerobot_v21.tables import column_array, read_parquet, read_pictures
from prts_core.data.lerobot_v21.v30 import Episodes30, is_v30, read_stats30, read_tasks30, read_v30
from prts_core.io.errors import DataError, suggest
from prts_core.io.object_storage import RemoteFolder, is_url


class LeRobotDataset:
    """A dataset on disk. `LeRobotDataset.open(root)` reads its metadata; episodes are read when asked for.

    Attributes: root, info, rows (one EpisodeRow per episode, in order), lengths (episodes,) rows of each, tasks
    {task_index: sentence}. An episode's rows and frames are numbered from 0, whatever file they lie in.
    """

    lengths: np.ndarray

    def __init__(self, root: Path, info: Info, tasks: dict[int, str], remote: RemoteFolder | None = None) -> None:
        self.root, self.info, self.tasks, self.remote = root, info, tasks, remote
        self._recorded: Episodes30 | None = None

    @classmethod
    def open(cls, root: Path | str, lengths: np.ndarray | None = None) -> LeRobotDataset:
        """Read info, episodes and tasks of any version. Raises DataError where a file is missing or malformed.

        root: a folder, or a URL of object storage (prts_core.io.object_storage), whose metadata is downloaded now and
        whose tables and videos are when they are read.
        lengths: rows of each episode, where an index has them already; meta/episodes.jsonl of v2.1, minutes and
        gigabytes for a million episodes, is then read only when somebody asks for `rows`. Of v3.0 and v3.1 the
        episodes' table is read in any case: it says in which file each one lies.
        """
        remote, root = mirror(root) if isinstance(root, str) and is_url(root) else (None, Path(root))
        if not root.is_dir():
            raise DataError("A dataset folder is missing", file=root, expected="a LeRobot folder with meta/info.json")
        remote = remote or remote_of(root)
        if is_v30(root):
            recorded = read_v30(root)
            dataset = cls(root, recorded.info, read_tasks30(root), remote)
            dataset._recorded, dataset.lengths = recorded, recorded.lengths
            return dataset
        tasks = {row.task_index: row.task for row in read_table(root, "tasks")}
        dataset = cls(root, read_info(root), tasks, remote)
        dataset.lengths = np.array([row.length for row in dataset.rows]) if lengths is None else lengths
        return dataset

    @cached_property
    def rows(self) -> tuple[EpisodeRow, ...]:
        if self._recorded is not None:
            return self._recorded.rows()
        rows: list[EpisodeRow] = read_table(self.root, "episodes")
        found = [row.episode_index for row in rows]
        if found != list(range(len(rows))):
            wrong = next(i for i, index in enumerate(found) if index != i)
            raise DataError(
                "Episodes are not numbered 0, 1, 2, ... in order",
                file=self.root / "meta" / "episodes.jsonl",
                field=f"line {wrong + 1}, episode_index",
                found=found[wrong],
                expected=wrong,
            )
        return tuple(rows)

    def episode_stats(self) -> dict[int, EpisodeStatsRow]:
        """The statistics that are stored for each episode; none where there are none."""
        if self._recorded is not None:
            return {row.episode_index: row for row in read_stats30(self.root)}
        there = (self.root / self.info.tables["episodes_stats"]).is_file()
        return {row.episode_index: row for row in read_table(self.root, "episodes_stats")} if there else {}

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def camera_keys(self) -> list[str]:
        return self.info.camera_keys

    @cached_property
    def contract(self) -> Contract:
        """What the numbers mean: meta/contract.json, written by the stage convert."""
        return Contract.load(self.root / "meta" / "contract.json")

    @cached_property
    def starts(self) -> list[int]:
        """Rows of all episodes before each one."""
        return (np.cumsum(self.lengths) - self.lengths).tolist()

    def episodes(self, split: str | None = None) -> list[int]:
        """Episode indices of a split ("train", "heldout", ...), or of the whole dataset."""
        if split is None:
            return list(range(len(self.lengths)))
        ranges = self.info.split_ranges
        cure = "name an existing split, or set source.heldout_episodes and convert again"
        self._require("split", split, ranges, "splits", cure)
        return list(range(ranges[split].start, min(ranges[split].stop, len(self.lengths))))

    def instruction(self, episode: int) -> str:
        """The first task sentence of an episode."""
        return self.rows[episode].tasks[0]

    def length(self, episode: int) -> int:
        return int(self.lengths[episode])

    def path(self, file: str) -> Path:
        """A table or video by its path below the dataset's folder, downloaded where it lies in object storage."""
        return self.root / file if self.remote is None else self.remote.fetch(file)

    # ---- columns ---------------------------------------------------------------------------------------------------
    def table(self, episode: int, keys: Iterable[str] | None = None) -> pa.Table:
        """The episode's parquet rows. DataError for a missing or damaged file, a missing column, a wrong length."""
        self._known(episode)
        path = self.path(self.info.data_file(episode))
        table = read_parquet(path, list(keys) if keys is not None else None, self.info.data_rows(episode))
        if table.num_rows != self.length(episode):
            raise DataError(
                "An episode's table has the wrong number of rows",
                file=path,
                found=table.num_rows,
                expected=f"{self.length(episode)} ({self.info.tables['episodes']})",
                cure="restore the file from its source, or convert again",
            )
        return table

    def columns(self, episode: int, keys: Iterable[str]) -> dict[str, np.ndarray]:
        """One episode's columns: scalars (T,), vectors (T, D), in their stored dtype."""
        keys = list(keys)
        table = self.table(episode, keys)
        path = self.root / self.info.data_file(episode)
        return {key: column_array(table.column(key), path, key) for key in keys}

    def states(self, episode: int) -> np.ndarray:
        """observation.state (T, D) float32."""
        return self._vectors(episode, STATE)

    def actions(self, episode: int) -> np.ndarray:
        """action (T, A) float32."""
        return self._vectors(episode, ACTION)

    def _vectors(self, episode: int, key: str) -> np.ndarray:
        values = self.columns(episode, [key])[key]
        return values.reshape(len(values), -1).astype(np.float32, copy=False)  # lerobot stores width 1 as a scalar

    # ---- cameras ---------------------------------------------------------------------------------------------------
    def frames(
        self, episode: int, camera: str, indices: Sequence[int] | None = None, size: int | tuple[int, int] | None = None
    ) -> np.ndarray:
        """RGB images of one camera, (N, H, W, 3) uint8: all or those at `indices`.

        size: letterboxed into a square (int) or resized to (height, width); none: as stored.
        """
        self._known(episode)
        self._require("camera", camera, self.camera_keys)
        if self.info.features[camera].is_video:
            from prts_core.data.lerobot_v21 import video  # tables are read where PyAV is not installed, too

            path, first = self.path(self.info.video_file(episode, camera)), self.info.first_frame(episode, camera)
            if first is None:
                return video.decode(path, indices, size)
            wanted = range(self.length(episode)) if indices is None else indices
            return video.decode(path, [first + index for index in wanted], size, self.fps)
        stacked = self._stills(episode, camera, indices)
        return stacked if size is None else resize_for_model(stacked, size)

    @property
    def joined_fps(self) -> float | None:
        """The frame rate by which frames of videos that hold several episodes are numbered; none: a file an episode."""
        return None if self._recorded is None else self.fps

    def video_frame(self, episode: int, camera: str, row: int) -> tuple[Path, int]:
        """The file with a row's picture, and the number of the frame in it."""
        return self.path(self.info.video_file(episode, camera)), (self.info.first_frame(episode, camera) or 0) + row

    def depth(self, episode: int, key: str, indices: Sequence[int] | None = None) -> np.ndarray:
        """Depth pictures of one depth camera, (N, H, W) uint16 in the unit of its `info` in info.json; 0: nothing."""
        self._known(episode)
        known = [name for name, feature in self.info.features.items() if feature.is_depth and not feature.is_video]
        self._require("depth camera", key, known)
        return self._stills(episode, key, indices, depth=True)

    def _stills(self, episode: int, key: str, indices: Sequence[int] | None, depth: bool = False) -> np.ndarray:
        file, images = self.path(self.info.data_file(episode)), []
        wanted, part = range(self.length(episode)) if indices is None else indices, self.info.data_rows(episode)
        for data in read_pictures(file, key, wanted if part is None else [part[index] for index in wanted]):
            with opened_picture(data, "An image in a table cannot be decoded", file=file) as image:
                images.append(np.asarray(image, np.uint16) if depth else np.asarray(image.convert("RGB")))
        return np.stack(images)

    def _require(
        self, what: str, name: str, known: Iterable[str], field: str = "features", cure: str | None = None
    ) -> None:
        if name not in known:
            problem = f"The dataset has no {what} {name!r}{suggest(name, known)}"
            info, found = self.root / "meta" / "info.json", ", ".join(known) or "none"
            raise DataError(problem, file=info, field=field, found=found, expected=name, cure=cure)

    def _known(self, episode: int) -> None:
        if not 0 <= episode < len(self.lengths):
            raise DataError("No such episode", file=self.root, found=episode, expected=f"0 to {len(self.lengths) - 1}")
