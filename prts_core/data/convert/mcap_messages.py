"""Read messages of MCAP files as numpy arrays: ROS 2 (cdr), JSON and protobuf; pictures and video of ROS and Foxglove.

A message is whatever the `mcap` packages decode it to: an object with attributes, or a dict; nothing of it is executed.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.data.convert.tfds_features import picture
from prts_core.io.errors import DataError, MissingExtraError, require

EXTRA = "mcap"
COMPRESSED = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/CompressedImage", "foxglove.CompressedImage")
RAW = ("sensor_msgs/msg/Image", "sensor_msgs/Image", "foxglove.RawImage")
VIDEOS = ("foxglove.CompressedVideo", "foxglove_msgs/msg/CompressedVideo")
PICTURES = (*COMPRESSED, *RAW, *VIDEOS)
_CODECS = {"h264": "h264", "h265": "hevc", "hevc": "hevc", "vp9": "vp9", "av1": "libdav1d"}
# encoding -> (dtype, channels stored, order of the channels that become RGB)
_ENCODINGS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "rgb8": ("uint8", 3, (0, 1, 2)),
    "bgr8": ("uint8", 3, (2, 1, 0)),
    "8UC3": ("uint8", 3, (2, 1, 0)),
    "rgba8": ("uint8", 4, (0, 1, 2)),
    "bgra8": ("uint8", 4, (2, 1, 0)),
    "mono8": ("uint8", 1, (0, 0, 0)),
    "8UC1": ("uint8", 1, (0, 0, 0)),
    "mono16": ("uint16", 1, ()),
    "16UC1": ("uint16", 1, ()),
    "32FC1": ("float32", 1, ()),
}
_DEPTH_HEAD = 12  # bytes that ROS's compressed_depth_image_transport puts before the PNG
_AXES = ("x", "y", "z", "w")
Decoder = Callable[[bytes], Any]


class Decoders:
    """Decoders of one file's channels, made once each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._made: dict[int, Decoder] = {}
        self._factories: dict[str, Any] = {}

    def of(self, channel: Any, schema: Any) -> Decoder:
        """The decoder of a channel; a DataError for an encoding that is not read."""
        if channel.id not in self._made:
            self._made[channel.id] = self._make(channel, schema)
        return self._made[channel.id]

    def _make(self, channel: Any, schema: Any) -> Decoder:
        encoding = channel.message_encoding
        if encoding == "json":
            return json.loads
        package = {"cdr": "mcap_ros2", "protobuf": "mcap_protobuf"}.get(encoding)
        if package is not None:
            if package not in self._factories:
                self._factories[package] = require(f"{package}.decoder", EXTRA).DecoderFactory()
            decoder = self._factories[package].decoder_for(encoding, schema)
            if decoder is not None:
                return decoder
        # The reader of ROS 1 messages runs Python that it generates from the definitions inside the file.
        again = "record again with message definitions (ros2 bag record --storage mcap does so)"
        ros1 = "make a ROS 2 bag of it: `rosbags-convert --src in.bag --dst out --dst-storage mcap` (PyPI: rosbags)"
        raise DataError(
            "Messages of a topic are in an encoding that is not read",
            file=self.path,
            field=channel.topic,
            found=f"{encoding}, schema {schema.encoding if schema else 'none'}",
            expected="cdr with ros2msg, json, or protobuf",
            cure=ros1 if encoding == "ros1" else again,
        )


def member(message: Any, name: str) -> Any:
    """Part `name` of a message; KeyError where it has none."""
    if isinstance(message, dict):
        return message[name]
    if name.startswith("_") or not hasattr(message, name):
        raise KeyError(name)
    return getattr(message, name)


def stamp(message: Any) -> int:
    """The time inside a message, in nanoseconds: header.stamp of ROS, timestamp of Foxglove."""
    try:
        time = member(member(message, "header"), "stamp")
    except KeyError:
        time = member(message, "timestamp")
    for second, nano in (("sec", "nanosec"), ("sec", "nsec"), ("seconds", "nanos")):
        try:
            return int(member(time, second)) * 1_000_000_000 + int(member(time, nano))
        except KeyError:
            continue
    raise KeyError("stamp")


def numbers(message: Any, path: str) -> np.ndarray:
    """The numbers at the dotted `path` of a message: () or (D,); a vector or quaternion as its x, y, z(, w).

    KeyError where the path leads nowhere, TypeError where no numbers are there.
    """
    value = message
    for name in path.split("."):
        value = member(value, name)
    if not isinstance(value, int | float | str | bytes | list | tuple | np.ndarray) and not hasattr(value, "__len__"):
        axes = [axis for axis in _AXES if _has(value, axis)]
        value = [member(value, axis) for axis in axes]
    elif isinstance(value, dict):
        value = [value[axis] for axis in _AXES if axis in value]
    array = np.asarray(value if np.isscalar(value) else list(value))
    if array.ndim > 1 or array.dtype.kind not in "fiub" or array.shape == (0,):
        raise TypeError(f"{array.dtype}{list(array.shape)}")
    return array


def _has(value: Any, name: str) -> bool:
    try:
        member(value, name)
    except KeyError:
        return False
    return True


def image(message: Any, schema: str, size: tuple[int, ...] | None, where: tuple[Path, str]) -> np.ndarray:
    """A picture as (H, W, 3) uint8 RGB, or depth as (H, W) uint16 or float32. size: what it must be, if known. message:
    of a video, its first one or what VideoStream made of it.

    Raises DataError for an encoding that is not read, and for bytes that are not the picture they claim to be.
    """
    path, field = where
    if schema in VIDEOS:
        pixels = message if isinstance(message, np.ndarray) else VideoStream().frame(message, where)
        return _of_size(pixels, size, where)
    try:
        data = _bytes(message)
        if schema in COMPRESSED:
            kind = str(member(message, "format"))
            if "compressedDepth" in kind:
                if "16UC1" not in kind:
                    raise _refused(where, f"compressed depth {kind!r}", "16UC1")
                data = data[_DEPTH_HEAD:]
            return _coloured(picture(data, size, "uint16" if "16UC1" in kind else "uint8", path, field))
        pixels = _raw(message, data, where)
    except (KeyError, binascii.Error, TypeError, ValueError) as err:
        if isinstance(err, DataError | MissingExtraError):
            raise
        raise _refused(where, f"{type(err).__name__}: {err}"[:160], "data, encoding, height, width and step") from err
    return _of_size(pixels, size, where)


class VideoStream:
    """The pictures of one topic of compressed video. They are made from one another, so `frame` is given every message
    in the order recorded, the first a keyframe; Foxglove's schema wants one picture a message and none reordered."""

    def __init__(self) -> None:
        self._decoder: Any = None

    def frame(self, message: Any, where: tuple[Path, str]) -> np.ndarray:
        """(H, W, 3) uint8 RGB. Raises DataError for data that is not the next picture."""
        import av
        from av.codec.context import Flags

        try:
            data, kind = _bytes(message), str(member(message, "format"))
        except (KeyError, binascii.Error, TypeError, ValueError) as err:
            raise _refused(where, f"{type(err).__name__}: {err}"[:160], "data and format") from err
        first = self._decoder is None
        if first:
            if kind not in _CODECS:
                raise _refused(where, f"video in format {kind!r}", ", ".join(_CODECS))
            self._decoder = av.CodecContext.create(_CODECS[kind], "r")
            self._decoder.thread_count = 1
            self._decoder.flags |= Flags.low_delay
        try:
            frames = self._decoder.decode(av.Packet(data))
        except av.error.FFmpegError as err:
            raise _refused(where, f"{type(err).__name__}: {err.strerror}", f"the next picture in {kind}") from err
        if len(frames) != 1 or frames[0].is_corrupt or (first and not frames[0].key_frame):
            found = f"{len(frames)} pictures" if len(frames) != 1 else "a picture that needs others before it"
            raise _refused(where, found, f"one {kind} picture a message, the first a keyframe")
        return frames[0].to_ndarray(format="rgb24")


def _bytes(message: Any) -> bytes:
    data = member(message, "data")
    return base64.b64decode(data, validate=True) if isinstance(data, str) else bytes(data)


def _of_size(pixels: np.ndarray, size: tuple[int, ...] | None, where: tuple[Path, str]) -> np.ndarray:
    if size is not None and pixels.shape != tuple(size):
        raise _refused(where, f"a picture {list(pixels.shape)}", f"{list(size)}, as the first")
    return pixels


def _raw(message: Any, data: bytes, where: tuple[Path, str]) -> np.ndarray:
    encoding = str(member(message, "encoding"))
    if encoding not in _ENCODINGS:
        raise _refused(where, f"encoding {encoding!r}", ", ".join(_ENCODINGS))
    dtype, channels, order = _ENCODINGS[encoding]
    height, width, step = (int(member(message, name)) for name in ("height", "width", "step"))
    wide = np.dtype(dtype).itemsize * channels * width
    if step < wide or len(data) < height * step or min(height, width) < 1:
        raise _refused(where, f"{len(data)} bytes, step {step}", f"{height} rows of at least {wide} bytes")
    big = bool(member(message, "is_bigendian")) if _has(message, "is_bigendian") else False
    lines = np.frombuffer(data, np.uint8, height * step).reshape(height, step)[:, :wide]
    pixels = np.ascontiguousarray(lines).view(np.dtype(dtype).newbyteorder(">" if big else "<"))
    pixels = pixels.reshape(height, width, channels).astype(dtype)
    return pixels[..., list(order)] if order else pixels[..., 0]


def _coloured(pixels: np.ndarray) -> np.ndarray:
    """Grey JPEGs and PNGs as RGB, as a camera's pictures are; depth stays as it is."""
    return np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 and pixels.dtype == np.uint8 else pixels


def _refused(where: tuple[Path, str], found: str, expected: str) -> DataError:
    return DataError(
        "A picture's message cannot be read", file=where[0], field=where[1], found=found, expected=expected
    )
