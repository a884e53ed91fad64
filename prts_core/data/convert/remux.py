"""Join and cut mp4 videos by copying their packets: no picture is decoded, none loses quality.

A cut is possible only where a keyframe begins and all packets of the piece follow one another; elsewhere it is refused,
or encoded again with a setting that is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from prts_core.config.schema import VideoConfig
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.frames import opened
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path

_TOLERANCE = Fraction(1, 4)  # of a frame: times are sums of durations that writers round to microseconds or clock ticks


@dataclass(frozen=True)
class Piece:
    """One episode inside a longer file. start_s: time of its first frame; frames: how many; output: its own file."""

    start_s: float
    frames: int
    output: Path


@dataclass(frozen=True)
class _Packets:
    """What a file's packets say, in the order they are decoded. time: seconds from the first frame, (N,)."""

    time: np.ndarray
    keyframe: np.ndarray


def codec_key(path: Path) -> tuple:
    """What two files must share to stand in one stream: codec, size, pixel format, and the codec's own header."""
    with opened(path) as container:
        context = container.streams.video[0].codec_context
        name = {"libdav1d": "av1"}.get(context.name, context.name)
        return name, context.width, context.height, str(context.pix_fmt), bytes(context.extradata or b"")


def join(parts: Sequence[Path], frames: Sequence[int], output: Path, fps: float) -> None:
    """Copy the packets of `parts` one after another into `output`; frame n of the whole lies at n / fps seconds.

    frames: how many each part must have. Raises DataError for another number, for times that are not a multiple of
    1 / fps, and for parts of different codecs (`codec_key`).
    """
    rate = Fraction(fps).limit_denominator(1001)
    codec = codec_key(parts[0])
    with atomic_path(output) as partial, av.open(str(partial), "w", format="mp4") as out, ExitStack() as stack:
        # the first part lends the stream its codec parameters and stays open for it
        template = stack.enter_context(opened(parts[0])).streams.video[0]
        stream, clock = _out_stream(out, template, rate)
        before = 0
        for path, count in zip(parts, frames, strict=True):
            if codec_key(path) != codec:
                raise DataError(
                    "Videos of different codec settings cannot be one stream",
                    file=path,
                    found=str(codec_key(path)[:4]),
                    expected=f"as {parts[0]}: {codec[:4]}, and an equal codec header",
                )
            with opened(path) as container:
                known = _scan(container)
                _regular(known.time, 0.0, count, fps, path, alone=True)
            with opened(path) as container:
                for packet, number in zip(_demux(container), _numbers(known.time, 0.0, fps), strict=True):
                    _mux(out, stream, packet, before + number, clock)
            before += count


def cut(path: Path, pieces: Sequence[Piece], fps: float, reencode: VideoConfig | None = None) -> None:
    """Write every piece of `path` to its own file, frame n at n / fps seconds.

    reencode: the setting for pieces that do not begin at a keyframe; none: such a piece is refused. Raises DataError
    where the file lacks frames of a piece.
    """
    with opened(path) as container:
        known = _scan(container)
    for piece in pieces:
        _regular(known.time, piece.start_s, piece.frames, fps, path)
    rate = Fraction(fps).limit_denominator(1001)
    for piece in pieces:
        numbers = _numbers(known.time, piece.start_s, fps)
        inside = np.flatnonzero((numbers >= 0) & (numbers < piece.frames))
        first, last = int(inside[0]), int(inside[-1])
        if known.keyframe[first] and last - first + 1 == piece.frames:
            _copy(path, piece, first, last, numbers, rate, float(known.time[first]))
        elif reencode is not None:
            presented = np.sort(known.time)
            start = int(np.searchsorted(presented, piece.start_s - 0.5 / fps))
            frames = video.decode(path, range(start, start + piece.frames))
            video.encode(piece.output, frames, fps, reencode)
        else:
            raise DataError(
                "An episode's video does not begin at a keyframe, so that it cannot be cut without encoding it again",
                file=path,
                field=f"{piece.frames} frames from {piece.start_s:.6g} s",
                found="a frame that needs earlier ones" if not known.keyframe[first] else "packets of other episodes",
                expected="a keyframe at the episode's first frame",
                cure="encode such episodes again: --reencode (in a dataset's YAML: reencode: true)",
            )


def _copy(path: Path, piece: Piece, first: int, last: int, numbers: np.ndarray, rate: Fraction, start: float) -> None:
    with (
        opened(path) as container,
        atomic_path(piece.output) as partial,
        av.open(str(partial), "w", format="mp4") as out,
    ):
        source = container.streams.video[0]
        stream, clock = _out_stream(out, source, rate)
        assert source.time_base is not None  # _scan has refused streams without
        # Seeking lands on the keyframe itself or one before it: packets are then told by their time, not by counting.
        begin = source.start_time or 0
        container.seek(begin + round(start / float(source.time_base)), stream=source, backward=True, any_frame=False)
        position: int | None = None
        for packet in _demux(container):
            assert packet.pts is not None
            time = float((packet.pts - begin) * source.time_base)
            if position is None and abs(time - start) * float(rate) < _TOLERANCE:
                position = first
            if position is not None:
                _mux(out, stream, packet, int(numbers[position]), clock)
                position += 1
                if position > last:
                    break


def _out_stream(out: av.container.OutputContainer, template: av.VideoStream, rate: Fraction) -> tuple:
    """The copied stream and its clock: (ticks a frame, tick in seconds), a frame being a whole number of ticks."""
    stream = out.add_stream_from_template(template, opaque=True)  # opaque: no encoder is asked for
    ticks = rate.denominator * 512
    tick = Fraction(1, rate.numerator * 512)
    stream.time_base = tick
    return stream, (ticks, tick)


def _mux(out: av.container.OutputContainer, stream: av.VideoStream, packet: av.Packet, number: int, clock) -> None:
    """Write `packet` as frame `number`; what its decoding time lags behind its presentation stays, in whole frames."""
    ticks, tick = clock
    assert packet.pts is not None  # _scan has refused packets without
    lag = Fraction(packet.pts - (packet.dts if packet.dts is not None else packet.pts)) * packet.time_base
    packet.pts = number * ticks
    packet.dts = packet.pts - round(lag / tick / ticks) * ticks
    packet.duration = ticks
    packet.time_base = tick
    packet.stream = stream
    out.mux(packet)


def _demux(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Packets of the video stream without the empty one that ends it."""
    return (packet for packet in container.demux(video=0) if packet.size)


def _scan(container: av.container.InputContainer) -> _Packets:
    stream = container.streams.video[0]
    base, start = stream.time_base, stream.start_time or 0
    if base is None:
        raise DataError("A video has no clock", file=container.name, cure="restore it from its source")
    times: list[float] = []
    keys: list[bool] = []
    for packet in _demux(container):
        if packet.pts is None:
            raise DataError("A video has a frame without a time", file=container.name, field=f"packet {len(times)}")
        times.append(float((packet.pts - start) * base))
        keys.append(packet.is_keyframe)
    return _Packets(np.array(times), np.array(keys, bool))


def _numbers(times: np.ndarray, start_s: float, fps: float) -> np.ndarray:
    """Frame numbers (N,) counted from `start_s`, in the order of decoding."""
    return np.rint((times - start_s) * fps).astype(np.int64)


def _regular(times: np.ndarray, start_s: float, frames: int, fps: float, path: Path, alone: bool = False) -> None:
    """Refuse a video that does not have exactly one frame at each of start_s + n / fps, 0 <= n < frames.

    alone: nor any other frame.
    """
    position = (times - start_s) * fps
    number = np.rint(position)
    inside = (number >= 0) & (number < frames)
    found = np.sort(number[inside])
    if len(found) != frames or (np.diff(found) != 1).any() or (alone and len(times) != frames):
        raise DataError(
            "A video does not have one frame for each row of its episode",
            file=path,
            field=f"from {start_s:.6g} s",
            found=f"{len(times) if alone else len(found)} frames, {len(np.unique(found))} of them at different rows",
            expected=f"{frames} frames, {fps:g} a second",
            cure="restore the video from its source, or leave the episode out",
        )
    late = np.abs(position - number)[inside].max()
    if late > _TOLERANCE:
        raise DataError(
            "A video's frames do not lie at the dataset's rate",
            file=path,
            found=f"a frame {late / fps:.4f} s off its time",
            expected=f"multiples of 1 / {fps:g} s from {start_s:.6g} s",
            cure="correct fps in meta/info.json, or record the video at a constant rate",
        )
