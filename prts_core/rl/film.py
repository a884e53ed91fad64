"""Film an evaluation: its episodes played again from their recorded actions, side by side in one video.

Pictures go through the disk: a chunk of one episode and one picture of each are in memory, however many there are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from prts_core.config.schema import VideoConfig
from prts_core.data.images import letterbox
from prts_core.data.lerobot_v21.video import encode_each
from prts_core.io.errors import DataError
from prts_core.io.files import explain_os_errors, read_jsonl
from prts_core.io.journal import Row
from prts_core.rollout.episode_plan import EpisodePlan
from prts_core.rollout.results import FILM_HZ, FILM_STEPS, choose_videos, despite_losses
from prts_core.rollout.runner import KEY, row_key
from prts_core.sim import protocol
from prts_core.sim.pool import Pool, WorkerLost

NAME = "evaluation.mp4"
TILES, COLUMNS = 12, 4
CELL, BORDER, GAP = 240, 4, 4  # pixels: of an episode's picture, the colour of its outcome around it, between two
RUNNING, SUCCESS, FAILURE = (96, 103, 111), (31, 95, 168), (179, 38, 30)


@dataclass(frozen=True)
class Tile:
    """One episode of a film."""

    task: str
    initial_state: int
    success: bool


@dataclass(frozen=True)
class Film:
    """tiles: as they lie, row by row. episodes: of the evaluation. faults: what could not be played again, in words."""

    name: str
    iteration: int
    episodes: int
    tiles: tuple[Tile, ...]
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Clip:
    """One episode's pictures on disk."""

    path: Path
    success: bool

    @property
    def pictures(self) -> np.ndarray:
        """(N, CELL, CELL, 3) uint8, read as they are asked for."""
        flat = np.memmap(self.path, np.uint8, "r")
        return flat.reshape(-1, CELL, CELL, 3)


def write_film(pool: Pool, plan: EpisodePlan, evaluation: Path, target: Path, iteration: int) -> Film | None:
    """Film at most TILES episodes of an evaluation, failures first, into target/NAME; none where none can be played.

    evaluation: the folder of its journal and actions (rollout/run_suite.py). Finished episodes stand still, framed in
    blue where they succeeded and in red where they failed, until the longest is over. DataError where an episode lacks.
    """
    rows = recorded_rows(evaluation, plan)
    clips, tiles, faults = [], [], []
    with explain_os_errors(target), tempfile.TemporaryDirectory(dir=evaluation, prefix=".film-") as scratch:
        for index in choose_videos(plan, rows, TILES):
            row = rows[index]
            actions = np.load(evaluation / "actions" / f"{index:05d}.npy", allow_pickle=False)
            path = Path(scratch) / f"{index:05d}.rgb"
            try:
                success = despite_losses(partial(_play, pool, plan, index, actions, path))
            except WorkerLost as err:
                faults.append(f"{row['task']} {row['initial_state']}: not filmed ({err.problem})")
                continue
            if success != row["success"]:
                faults.append(f"{row['task']} {row['initial_state']}: played again it ended otherwise")
            clips.append(_Clip(path, bool(row["success"])))
            tiles.append(Tile(row["task"], row["initial_state"], bool(row["success"])))
        if not clips:
            return None
        every = _every(plan)
        encode_each(
            target / NAME,
            _tiled([clip.pictures for clip in clips], [clip.success for clip in clips]),
            sides(len(clips)),
            plan.suite.contract.control_hz / every,
            VideoConfig(crf=26, gop=20, tune="none"),
        )
    return Film(NAME, iteration, len(rows), tuple(tiles), tuple(faults))


def recorded_rows(evaluation: Path, plan: EpisodePlan) -> list[Row]:
    """The journal's rows, in the plan's order. DataError where one lacks."""
    path = evaluation / "journal.jsonl"
    known = {tuple(row[name] for name in KEY): row for line in read_jsonl(path) if (row := line.get("episode"))}
    missing = [key for key in plan.keys if row_key(key) not in known]
    if missing:
        raise DataError(
            "An evaluation is not whole",
            file=path,
            found=f"{len(known)} of {len(plan.keys)} episodes; none of {missing[0].task} {missing[0].initial_state}",
            cure="run the same command again",
        )
    return [known[row_key(key)] for key in plan.keys]


def _every(plan: EpisodePlan) -> int:
    return max(1, round(plan.suite.contract.control_hz / FILM_HZ))


def _play(pool: Pool, plan: EpisodePlan, index: int, actions: np.ndarray, path: Path) -> bool:
    """Write an episode's pictures, small, one after another; whether it succeeded."""
    every, success = _every(plan), False
    with path.open("wb") as file:
        reply = pool.ask(
            0, protocol.reset(plan.keys[index], perturbation=plan.perturbation, observe=False, render=True)
        )
        file.write(letterbox(reply["frame"][None], CELL).tobytes())
        for begin in range(0, len(actions), FILM_STEPS):
            reply = pool.ask(0, protocol.step(actions[begin : begin + FILM_STEPS], observe=False, render=every))
            success = bool(reply["successes"].any())
            if reply["frames"] is not None:
                file.write(letterbox(reply["frames"], CELL).tobytes())
    return success


def columns_of(count: int) -> int:
    return min(COLUMNS, math.ceil(math.sqrt(count)))


def sides(count: int) -> tuple[int, int]:
    """(height, width) in pixels of a film of that many tiles; both even."""
    columns, cell = columns_of(count), CELL + 2 * BORDER
    rows = -(-count // columns)
    return rows * (cell + GAP) - GAP, columns * (cell + GAP) - GAP


def _tiled(clips: Sequence[np.ndarray], successes: Sequence[bool]) -> Iterator[np.ndarray]:
    """Pictures of all clips (N_i, CELL, CELL, 3) side by side, until the longest ends and a moment more."""
    columns, cell = columns_of(len(clips)), CELL + 2 * BORDER
    canvas = np.full((*sides(len(clips)), 3), 255, np.uint8)
    longest = max(map(len, clips))
    for at in range(longest + round(FILM_HZ)):
        for place, (clip, success) in enumerate(zip(clips, successes, strict=True)):
            top, left = (n * (cell + GAP) for n in divmod(place, columns))
            box = canvas[top : top + cell, left : left + cell]
            if at < len(clip):
                box[:] = RUNNING
                box[BORDER:-BORDER, BORDER:-BORDER] = clip[at]
            elif at == len(clip):
                box[:] = SUCCESS if success else FAILURE
                box[BORDER:-BORDER, BORDER:-BORDER] = clip[-1]
        yield canvas
