"""Write camera images to mp4 files and read them with PyAV: same input, same bytes; frames by index, fast."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from prts_core.config.schema import VideoConfig
from prts_core.data.images import resize_for_model
from prts_core.data.lerobot_v21.frames import OpenVideo, opened
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import atomic_path

# The names that ffprobe (and so info.json) gives to what these encoders write.
CODEC_NAMES = {"libx264": "h264", "libsvtav1": "av1"}
os.environ.setdefault("SVT_LOG", "1")  # errors only; libsvtav1 otherwise prints 25 lines per file
_ONE = 1  # thread for colour conversion, as in frames.py


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
    encode_each(path, frames, frames.shape[1:3], fps, config)


def encode_each(
    path: Path, frames: Iterable[np.ndarray], sides: tuple[int, int], fps: float, config: VideoConfig
) -> None:
    """The same of pictures (H, W, 3) uint8 that come one by one, none of which is kept. sides: (height, width)."""
    height, width = sides
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
        params = ["mbtree=0", "rc-lookahead=0"]
        if config.tune == "psnr":
            params += ["psy=0", "aq-mode=0", "trellis=1"]
        return options | {"threads": "1", "bf": "0", "x264-params": ":".join(params)}
    if not config.preset.isdigit() or not 0 <= int(config.preset) <= 13:
        raise ConfigError(
            "libsvtav1 numbers its presets", field="video.preset", found=config.preset, expected="0 (slow) to 13 (fast)"
        )
    return options | {"svtav1-params": "lp=1"}


def probe(path: Path) -> VideoFacts:
    """Read the header of `path`; a DataError when it is missing or no video."""
    with opened(path) as container:
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


def decode(
    path: Path,
    indices: Sequence[int] | None = None,
    size: int | tuple[int, int] | None = None,
    fps: float | None = None,
) -> np.ndarray:
    """RGB frames of `path` as (N, H, W, 3) uint8: all, or those at `indices` in that order (repeats allowed).

    size: letterbox each frame to size x size, or resize it to (height, width), while decoding, so that long videos
    stay small in memory. fps: as `OpenVideo`.
    Raises DataError for a missing or damaged file and for an index that the video does not have.
    """
    shape = VideoReformatter()  # one for all frames: making one costs more than decoding a small frame
    if indices is None:
        with opened(path) as container:
            images = [_image(frame, size, shape) for frame in container.decode(video=0)]
        if not images:
            raise DataError("A video has no frames", file=path, cure="restore it from its source")
        return np.stack(images)
    if not len(indices):
        facts = probe(path)
        empty = np.zeros((0, facts.height, facts.width, 3), np.uint8)
        return empty if size is None else resize_for_model(empty, size)
    found: dict[int, np.ndarray] = {}
    with closing(OpenVideo(path, fps)) as video:
        for index in sorted(set(indices)):
            image = video.rgb(index)
            found[index] = image if size is None else resize_for_model(image[None], size)[0]
    return np.stack([found[index] for index in indices])


def _image(frame: av.VideoFrame, size: int | tuple[int, int] | None, shape: VideoReformatter) -> np.ndarray:
    image = shape.reformat(frame, format="rgb24", threads=_ONE).to_ndarray()
    return image if size is None else resize_for_model(image[None], size)[0]
