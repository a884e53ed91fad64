"""Check one video against its episode: there, whole, of the promised size and rate, one frame a row, a living picture.

How much is decoded is the caller's choice: `Depth`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import numpy as np

from prts_core.data.lerobot_v21.frames import VideoPool, opened
from prts_core.data.lerobot_v21.schema import EpisodeRow, Info
from prts_core.data.validation.episode import longest_run
from prts_core.data.validation.report import Finding
from prts_core.io.errors import DataError

# every: all frames are decoded. ends: the first and the last keyframe's group. packets: none, the index is counted.
Depth = Literal["every", "ends", "packets"]
FROZEN_S = 1.0  # seconds of one and the same picture
TRAVEL = 0.25  # of the state's range in the episode, meanwhile: a robot at rest may well look the same
FLAT = 2.0  # grey levels of spread: a covered lens or a dead cable
FLICKER = 6  # grey levels: a keyframe of a still picture is not bit for bit the frame before it
_GRID = 4  # every fourth pixel of every fourth row is compared


def law_video(
    path: Path, row: EpisodeRow, key: str, info: Info, depth: Depth, motion: np.ndarray | None = None
) -> Iterator[Finding]:
    """Findings of the video at `path`. motion: `EpisodeSummary.motion` of the episode, where its table is sound."""
    file = info.video_file(row.episode_index, key)
    if not path.is_file():
        yield _broken(file, "the video is missing", "restore it from its source or its DVC cache")
        return
    try:
        with opened(path) as container:
            stream = container.streams.video[0]
            facts = (stream.codec_context.height, stream.codec_context.width, float(stream.average_rate or 0))
            promised = stream.frames
            if depth == "every":
                grey, damaged = _pictures(container.decode(stream))
                frames = len(grey)
            else:
                frames, damaged = _count(container, stream, path.stat().st_size)
                grey = _ends(container, stream) if depth == "ends" and frames else []
    except DataError as err:
        yield _broken(file, f"it cannot be decoded: {err.found or err.problem}")
        return
    except (ValueError, OverflowError) as err:
        yield _broken(file, f"it cannot be decoded: {type(err).__name__}: {err}, {path.stat().st_size} bytes")
        return
    yield from _promises(file, row, key, info, frames, promised, damaged, facts)
    if grey:
        yield from _living(file, grey, depth, motion, info.fps)


def law_clip(
    path: Path, row: EpisodeRow, key: str, info: Info, depth: Depth, pool: VideoPool, motion: np.ndarray | None = None
) -> Iterator[Finding]:
    """`law_video` of an episode that lies in a longer video."""
    episode, file = row.episode_index, info.video_name(row.episode_index, key)
    first = info.first_frame(episode, key) or 0
    if not path.is_file():
        yield _broken(file, "the video is missing", "restore it from its source")
        return
    wanted = range(first, first + row.length)
    try:
        with pool.video(path, first) as video:
            frames = video.count(wanted)
            shown = {"every": wanted, "ends": sorted({wanted[0], wanted[-1]}), "packets": ()}[depth]
            grey, damaged = _pictures(map(video.frame, shown)) if frames == row.length else ([], 0)
            facts = (video.height, video.width, info.fps)
    except DataError as err:
        yield _broken(file, f"it cannot be decoded: {err.found or err.problem}")
        return
    yield from _promises(file, row, key, info, frames, 0, damaged, facts)
    if grey:
        yield from _living(file, grey, depth, motion, info.fps)


def _promises(
    file: str,
    row: EpisodeRow,
    key: str,
    info: Info,
    frames: int,
    promised: int,
    damaged: int,
    facts: tuple[int, int, float],
) -> Iterator[Finding]:
    """What info.json and the table say of the video. facts: height, width, frames a second."""
    if damaged:
        yield _broken(file, f"{damaged} frames are damaged")
    if frames != row.length or (promised and promised != row.length):
        found = f"{frames} frames" + (f", {promised} in its header" if promised not in (0, frames) else "")
        yield Finding("videos", file, found, f"{row.length} frames, one for each row of its table")
    height, width = info.features[key].image_size
    if facts[:2] != (height, width):
        yield Finding("videos", file, f"{facts[1]}x{facts[0]} pixels", f"{width}x{height}, as info.json says")
    if abs(facts[2] - info.fps) > 0.01 * info.fps:
        yield Finding("videos", file, f"{facts[2]:g} frames a second", f"{info.fps:g}, as info.json says")


def _broken(
    file: str, found: str, cure: str = "restore it from its source or its DVC cache, or convert again"
) -> Finding:
    return Finding("videos", file, found, "a whole video", cure)


def _pictures(frames: Iterator[av.VideoFrame]) -> tuple[list[tuple[bool, float]], int]:
    """[(same as the frame before, spread of grey levels)] and how many frames the decoder calls damaged."""
    seen, damaged, before = [], 0, None
    for frame in frames:
        luma = _luma(frame)
        same = before is not None and luma.shape == before.shape and int(np.abs(luma - before).max()) <= FLICKER
        seen.append((same, float(luma.std())))
        damaged += bool(frame.is_corrupt)
        before = luma
    return seen, damaged


def _count(container: av.container.InputContainer, stream: av.VideoStream, size: int) -> tuple[int, int]:
    """Frames by the container's index, without reading them, and how many of them lie beyond the file's end; by
    reading the packets where the container has no whole index."""
    index = stream.index_entries
    if len(index) and len(index) == stream.frames:
        return len(index), sum(1 for entry in index if entry.pos + entry.size > size)
    packets = [packet.is_corrupt for packet in container.demux(stream) if packet.size]
    return len(packets), sum(packets)


def _ends(container: av.container.InputContainer, stream: av.VideoStream) -> list[tuple[bool, float]]:
    """The first frame, and the last keyframe with what follows it."""
    container.seek(0, stream=stream)
    seen = [(False, float(_luma(next(container.decode(stream))).std()))]
    container.seek(stream.duration or 0, stream=stream, backward=True)
    tail = deque(container.decode(stream), maxlen=1)
    return seen + [(False, float(_luma(frame).std())) for frame in tail]


def _luma(frame: av.VideoFrame) -> np.ndarray:
    """A thinned copy of the brightness plane, (H / 4, W / 4) int16; 10-bit video: of its low bytes too."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[::_GRID, : plane.width : _GRID].astype(np.int16)


def _living(
    file: str, grey: list[tuple[bool, float]], depth: Depth, motion: np.ndarray | None, fps: float
) -> Iterator[Finding]:
    """Warnings: a picture of one colour throughout; a picture that stands still while the robot moves."""
    if max(spread for _, spread in grey) < FLAT:
        cure = "the camera was covered or off: leave the episode out with source.episodes"
        found = "every frame is of one colour"
        yield Finding("dropped camera", file, found, "a picture", cure, severity="warning")
    elif depth == "every" and motion is not None:
        start, length = longest_run(np.array([same for same, _ in grey]))
        travelled = float(motion[max(start - 1, 0) : start - 1 + length].sum(dtype=np.float64))
        if length >= max(8, FROZEN_S * fps) and travelled > TRAVEL:
            found = f"one picture for {length + 1} rows while the state moves"
            cure = "the camera had stopped: leave the episode out, or cut it"
            yield Finding("frozen camera", file, found, "a picture a row", cure, start, "warning")
