"""Read frames of an mp4 by number, from a decoder that stays open: seek to the keyframe before, decode from there on.

Colours come out as uint8 (H, W, 3), or as float32 (3, H, W) in 0-1. Not torchcodec: over the same FFmpeg it decodes the
same pictures at the same speed (0.94 to 1.02 of it here, AV1 and H.264), and asks for an FFmpeg of the system and, in
what the package index has for this torch, for CUDA.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from prts_core.io.errors import DataError

_RESTORE = "restore it from its source or its DVC cache"
_ONE = 1  # thread for colour conversion: PyAV's default wakes every core for every small picture, tenfold the time
_PLANAR = 16  # swscale leaves the last (width mod 16) columns of planar RGB unwritten


@contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The container of a file that holds a video stream; PyAV's errors while it is open become a DataError."""
    with open_container(path) as container, faults(path):
        yield container


def open_container(path: Path) -> av.container.InputContainer:
    """`opened`, for the caller to close."""
    if not path.is_file():
        raise DataError("A video is missing", file=path, expected="an mp4 file", cure=_RESTORE)
    with faults(path):
        container = av.open(str(path), metadata_errors="replace")
        if not container.streams.video or container.streams.video[0].codec_context is None:  # or a damaged header
            container.close()
            raise DataError("A file holds no video stream that can be decoded", file=path, cure=_RESTORE)
        container.streams.video[0].codec_context.thread_count = 1
        return container


class faults:
    """Turn PyAV's errors on damaged files into one DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, av.error.FFmpegError):
            raise DataError(
                "A video cannot be decoded",
                file=self.path,
                found=f"{type(error).__name__}: {error.strerror}, {self.path.stat().st_size} bytes",
                expected="a whole H.264 or AV1 mp4",
                cure=_RESTORE,
            ) from error


@dataclass(frozen=True)
class _Index:
    """What the packets of a file say. start: time of its first frame; numbers: of its frames, ascending; keys: those of
    keyframes; seek: where to seek for each."""

    start: int
    numbers: np.ndarray
    keys: list[int]
    seek: list[int]


# Of files opened lately: in a long one it takes longer than opening it. The oldest leaves first.
_INDEXES: dict[tuple, _Index] = {}
_MAX_INDEXES = 512


class OpenVideo:
    """One video, open for reading by one thread at a time. Frame n is the one shown n / fps after the first.

    fps: what the dataset says, by default the file's own average, which in a file joined of many is off a little.

    The keyframes are known from the container's table of packets, without reading these; where pictures are stored in
    another order than shown (B-frames) the packets themselves are asked, once. Raises DataError for a missing or
    damaged file.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path = path
        self._container = open_container(path)
        try:
            self._stream = self._container.streams.video[0]
            rate, base = fps or self._stream.average_rate, self._stream.time_base
            if not rate or not base:
                raise DataError("A video has no frame rate", file=path, cure=_RESTORE)
            self._per_frame = 1 / (float(rate) * float(base))  # ticks
            with faults(path):
                info = path.stat()
                state = (str(path), info.st_ino, info.st_size, info.st_mtime_ns, self._per_frame)
                index = _INDEXES.get(state) or _INDEXES.setdefault(state, self._index())
                for old in list(_INDEXES)[:-_MAX_INDEXES]:  # a copy: other threads add and remove meanwhile
                    _INDEXES.pop(old, None)
            self._start, self._numbers, self._keys, self._starts = index.start, index.numbers, index.keys, index.seek
            self.frames = len(self._numbers)
        except BaseException:
            self._container.close()
            raise
        self._decoding: Iterator[av.VideoFrame] | None = None
        self._last: tuple[int, av.VideoFrame] | None = None  # where the decoder stands, and what it gave last
        self._packed, self._planar = VideoReformatter(), VideoReformatter()

    def _index(self) -> _Index:
        start = self._stream.start_time or 0
        table = [(entry.timestamp, entry.timestamp, entry.is_keyframe) for entry in self._stream.index_entries]
        plain = bool(table) and len(table) == self._stream.frames and table[0][0] == start
        if not plain or self._stream.codec_context.has_b_frames:
            table = [
                (packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe)
                for packet in self._container.demux(self._stream)
                if packet.size and packet.pts is not None
            ]
            start = min((pts for pts, _, _ in table), default=0)
        pts, dts, key = np.array(table, np.int64).reshape(-1, 3).T
        numbers = np.rint((pts - start) / self._per_frame).astype(np.int64)
        keys = sorted(zip(numbers[key == 1].tolist(), dts[key == 1].tolist(), strict=True))
        return _Index(start, np.sort(numbers), [number for number, _ in keys], [dts for _, dts in keys])

    def _number(self, pts: int) -> int:
        return round((pts - self._start) / self._per_frame)

    @property
    def height(self) -> int:
        return self._stream.codec_context.height

    @property
    def width(self) -> int:
        return self._stream.codec_context.width

    def count(self, numbers: range) -> int:
        """How many of these frames the file has, without decoding any."""
        first, last = np.searchsorted(self._numbers, (numbers.start, numbers.stop))
        return len(np.unique(self._numbers[first:last]))

    def distance(self, number: int) -> int:
        """Frames that must be decoded to show frame `number` from where the decoder stands."""
        from_key = number - self._keys[max(bisect_right(self._keys, number) - 1, 0)] + 1 if self._keys else number + 1
        ahead = number - self._last[0] if self._last is not None else -1
        return min(ahead, from_key) if ahead >= 0 else from_key

    def frame(self, number: int) -> av.VideoFrame:
        """Frame `number`; a DataError where the video does not have it."""
        if number < 0:
            raise DataError("Frame numbers start at 0", file=self.path, found=number)
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        with faults(self.path):
            key = bisect_right(self._keys, number) - 1
            before = self._last[0] if self._last is not None and self._decoding is not None else None
            if before is None or not (self._keys[key] if key >= 0 else 0) <= before + 1 <= number:
                self._container.seek(self._starts[max(key, 0)] if self._starts else 0, stream=self._stream)
                self._decoding = self._container.decode(self._stream)
            for frame in self._decoding or ():
                if frame.pts is None:
                    continue
                self._last = (self._number(frame.pts), frame)
                if self._last[0] >= number:
                    break
            else:
                self._decoding = self._last = None  # the end was reached: the next frame is sought
        if self._last is None or self._last[0] != number:
            raise DataError(
                "A video ends before the frame that is asked for" if self._last is None else "A video lacks a frame",
                file=self.path,
                found=f"{self.frames} frames",
                expected=f"frame {number}",
                cure="restore the video from its source, or drop the episode with source.episodes",
            )
        return self._last[1]

    def rgb(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self._packed.reformat(self.frame(number), format="rgb24", threads=_ONE).to_ndarray()

    def chw(self, number: int) -> np.ndarray:
        """(3, H, W) float32, the same colours divided by 255."""
        frame = self.frame(number)
        out = np.empty((3, frame.height, frame.width), np.float32)
        if frame.width % _PLANAR:
            colours = list(self.rgb(number).transpose(2, 0, 1))
        else:  # planes as they come: turning them over costs more than the conversion
            planes = self._planar.reformat(frame, format="gbrp", threads=_ONE).planes
            green, blue, red = (
                np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)[:, : frame.width]
                for plane in planes
            )
            colours = [red, green, blue]
        for colour, into in zip(colours, out, strict=True):
            np.divide(colour, np.float32(255), out=into)
        return out

    def close(self) -> None:
        self._decoding = self._last = None
        self._container.close()


class VideoPool:
    """Videos that were read lately stay open, at most `size` of them besides those in use; safe for threads. fps: as
    `OpenVideo`.

    A thread has the video it reads for itself: two that want the same file get a decoder each. After a fork the child
    opens its own, for the position in an open file is shared with the parent; it leaves the parent's alone.
    """

    def __init__(self, size: int = 16, fps: float | None = None) -> None:
        self.size, self.fps = size, fps
        self._begin()

    def _begin(self) -> None:
        self._idle: list[OpenVideo] = []  # the one used last stands last
        self._lock, self._process = threading.Lock(), os.getpid()

    @contextmanager
    def video(self, path: Path, number: int = 0) -> Iterator[OpenVideo]:
        """A decoder of `path` for this thread alone, the one that stands best for frame `number`."""
        if self._process != os.getpid():
            self._of_the_parent = self._idle  # kept: freeing a decoder that was copied while it worked is not safe
            self._begin()
        with self._lock:
            mine = [video for video in self._idle if video.path == path]
            chosen = min(mine, key=lambda video: video.distance(number)) if mine else None
            if chosen is not None:
                self._idle.remove(chosen)
        video = chosen or OpenVideo(path, self.fps)
        try:
            yield video
        except BaseException:
            video.close()
            raise
        with self._lock:
            self._idle.append(video)
            beyond, self._idle = self._idle[: -self.size or None], self._idle[-self.size :] if self.size else []
        for old in beyond:
            old.close()

    def __len__(self) -> int:
        return len(self._idle)

    def close(self) -> None:
        """Close every idle decoder; the pool may be used again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for video in idle:
            video.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "fps": self.fps}  # a spawned worker opens its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size, self.fps = state["size"], state["fps"]
        self._begin()
