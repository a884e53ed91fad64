"""Camera images in and out of mp4 files with PyAV: same input, same bytes; frames by index, fast.

It does not know datasets: a file, an array of frames, a frame rate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from prts_core.config.schema import VideoConfig
from prts_core.data.images import fit
from prts_core.errors import ConfigError, DataError
from prts_core.files import atomic_path

# The names that ffprobe (and so info.json) gives to what these encoders write.
CODEC_NAMES = {"libx264": "h264", "libsvtav1": "av1"}
os.environ.setdefault("SVT_LOG", "1")  # errors only; libsvtav1 otherwise prints 25 lines per file
_ONE = 1  # thread for colour conversion: PyAV's default wakes every core for every small picture, tenfold the time
_SEEK_GAP = 32  # frames: jumping is dearer than decoding a gap smaller than this


@dataclass(frozen=True)
class VideoFacts:
    """What a file's header says. frames: 0 where the header does not say."""

    height: int
    width: int
    fps: float
    frames: int
    codec: str
    pixel_format: str


def encode(path: Path, frames: np.ndarray, fps: float, config: VideoConfig) -> None:
    """Write (N, H, W, 3) uint8 RGB `frames` to the mp4 file `path`, whole or not at all.

    One encoder thread: the same frames give the same bytes on every machine with the same codec library.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise DataError(
            "Frames to encode have the wrong form",
            file=path,
            found=f"{frames.dtype} {frames.shape}",
            expected="uint8 (N > 0, height, width, 3)",
        )
    height, width = frames.shape[1:3]
    if "420" in config.pixel_format and (height % 2 or width % 2):
        raise DataError(
            f"{config.pixel_format} video needs even sides",
            file=path,
            found=f"{width}x{height}",
            cure="record even image sizes, or set video.pixel_format: yuv444p",
        )
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(
            config.codec, rate=Fraction(fps).limit_denominator(1001), options=_options(config)
        )
        stream.width, stream.height, stream.pix_fmt = width, height, config.pixel_format
        stream.codec_context.thread_count = 1
        shape = VideoReformatter()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(shape.reformat(frame, format=config.pixel_format, threads=_ONE)))
        container.mux(stream.encode(None))


def _options(config: VideoConfig) -> dict[str, str]:
    options = {"crf": str(config.crf), "g": str(config.gop), "preset": config.preset}
    if config.codec == "libx264":
        # No B-frames: frame n is packet n. No macroblock tree: on pictures of 32 pixels it reads memory that nobody
        # wrote (one video in fifty differed between runs), and with keyframes this close it has nothing to plan.
        return options | {"threads": "1", "bf": "0", "x264-params": "mbtree=0:rc-lookahead=0"}
    if not config.preset.isdigit() or not 0 <= int(config.preset) <= 13:
        raise ConfigError(
            "libsvtav1 numbers its presets", field="video.preset", found=config.preset, expected="0 (slow) to 13 (fast)"
        )
    return options | {"svtav1-params": "lp=1"}


def probe(path: Path) -> VideoFacts:
    """Read the header of `path`; a DataError when it is missing or no video."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return VideoFacts(
            height=context.height,
            width=context.width,
            fps=float(stream.average_rate or 0),
            frames=stream.frames,
            codec={"libdav1d": "av1"}.get(context.name, context.name),
            pixel_format=str(context.pix_fmt),
        )


def count_frames(path: Path) -> int:
    """Frames in `path`, counted by packets (the header may lie); nothing is decoded."""
    with _opened(path) as container, _faults(path):
        return sum(1 for packet in container.demux(video=0) if packet.size)


def decode_check(path: Path, every: bool, threads: int = 1) -> int:
    """Decode all frames (`every`) or only the first and last; return the number of frames by packets or by decoding."""
    if every:
        with _opened(path, threads) as container, _faults(path):
            return sum(1 for _ in container.decode(video=0))
    count = count_frames(path)
    if count:
        decode(path, [0, count - 1], threads=threads)
    return count


def decode(
    path: Path,
    indices: Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    threads: int = 1,
) -> np.ndarray:
    """RGB frames of `path` as (N, H, W, 3) uint8: all, or those at `indices` in that order (repeats allowed).

    size: letterbox each frame to size x size, or resize it to (height, width), while decoding, so that long videos
    stay small in memory.
    Raises DataError for a missing or damaged file and for an index that the video does not have.
    """
    shape = VideoReformatter()  # one for all frames: making one costs more than decoding a small frame
    if indices is None:
        with _opened(path, threads) as container, _faults(path):
            images = [_image(frame, size, shape) for frame in container.decode(video=0)]
        if not images:
            raise DataError("A video has no frames", file=path, cure="restore it from its source")
        return np.stack(images)
    wanted = sorted(set(indices))
    if wanted and wanted[0] < 0:
        raise DataError("Frame numbers start at 0", file=path, found=wanted[0])
    with _opened(path, threads) as container, _faults(path):
        found = {index: _image(frame, size, shape) for index, frame in _pick(container, wanted)}
    missing = [index for index in wanted if index not in found]
    if missing:
        raise DataError(
            "A video ends before the frame that is asked for",
            file=path,
            found=f"{count_frames(path)} frames",
            expected=f"frame {missing[0]}",
            cure="restore the video from its source, or drop the episode with source.episodes",
        )
    if not wanted:
        facts = probe(path)
        empty = np.zeros((0, facts.height, facts.width, 3), np.uint8)
        return empty if size is None else fit(empty, size)
    return np.stack([found[index] for index in indices])


def _image(frame: av.VideoFrame, size: int | tuple[int, int] | None, shape: VideoReformatter) -> np.ndarray:
    image = shape.reformat(frame, format="rgb24", threads=_ONE).to_ndarray()
    return image if size is None else fit(image[None], size)[0]


def _pick(container: av.container.InputContainer, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield (index, frame) for every index of the ascending list `wanted`, seeking over wide gaps."""
    stream = container.streams.video[0]
    rate, base, start = stream.average_rate, stream.time_base, stream.start_time or 0
    if not wanted or rate is None or base is None:
        return
    position, left = 0, list(wanted)
    while left:
        if left[0] - position > _SEEK_GAP:
            container.seek(start + int(left[0] / rate / base), stream=stream, backward=True, any_frame=False)
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            position = round((frame.pts - start) * base * rate)
            while left and left[0] < position:  # a hole in the video: the caller reports it
                left.pop(0)
            if left and left[0] == position:
                yield position, frame
                left.pop(0)
            if not left or left[0] - position > _SEEK_GAP:
                break
        else:
            return


def _opened(path: Path, threads: int = 1) -> av.container.InputContainer:
    if not path.is_file():
        raise DataError(
            "A video is missing", file=path, expected="an mp4 file", cure="restore it from its source or its DVC cache"
        )
    with _faults(path):
        container = av.open(str(path))
        if not container.streams.video:
            container.close()
            raise DataError("A file holds no video stream", file=path, cure="restore it from its source")
        container.streams.video[0].codec_context.thread_count = threads
        return container


class _faults:
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
                cure="restore it from its source or its DVC cache",
            ) from error
