"""Carry values between our own processes: MessagePack frames on a stream socket, no pickle.

A frame is its length (4 bytes, big endian) and one value in the form of io/msgpack.py, in which a torch tensor is
{"__tensor__": "bfloat16", "shape": [..], "data": bytes} and a dataclass the mapping of its fields. Arrays that come out
are read-only; tuples come out as lists.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prts_core.io.errors import DataError, ServeError
from prts_core.io.msgpack import Limits, pack, unpack

LENGTH = struct.Struct(">I")
LIMITS = Limits(max_bytes=2**31, max_depth=16, max_ndim=16, max_items=2**20, max_text=2**20)
PIECE = 1 << 22
TENSOR = "__tensor__"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def encode(value: Any) -> bytes:
    """One frame. DataError for what cannot travel."""
    try:
        data = pack(_plain(value))
    except (ServeError, TypeError, ValueError, OverflowError) as err:
        raise DataError("A value cannot travel to another process", found=str(err)) from err
    if len(data) > LIMITS.max_bytes:
        raise DataError("A value is too large to travel", found=f"{len(data)} bytes", expected=f"{LIMITS.max_bytes}")
    return LENGTH.pack(len(data)) + data


class Frames:
    """Bytes as they come in -> whole values. DataError for what is no frame of ours."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The values that `data` completes."""
        self.buffer += data
        found = []
        while len(self.buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self.buffer)
            if length > LIMITS.max_bytes:
                raise DataError("A socket carries no frame of ours", found=f"{length} bytes")
            if len(self.buffer) < LENGTH.size + length:
                break
            body = bytes(memoryview(self.buffer)[LENGTH.size : LENGTH.size + length])
            del self.buffer[: LENGTH.size + length]
            try:
                found.append(_restored(unpack(body, LIMITS)))
            except ServeError as err:
                raise DataError("A socket carries no frame of ours", found=str(err)) from err
        return found


def values(sock: socket.socket) -> Any:
    """Yield the values that come in until the other end is closed."""
    frames = Frames()
    while data := sock.recv(PIECE):
        yield from frames.feed(data)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise TypeError(f"a tensor of {name}")
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = flat.numpy() if flat.dtype == torch.bool else flat.view(torch.uint8).numpy()
        return {TENSOR: name, "shape": list(value.shape), "data": data.tobytes()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a mapping whose keys are no texts")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic | None):
        return value
    raise TypeError(f"a {type(value).__name__}")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return _tensor(value) if TENSOR in value else {key: _restored(inner) for key, inner in value.items()}


def _tensor(value: dict[Any, Any]) -> Tensor:
    name, sizes, data = value[TENSOR], value.get("shape"), value.get("data")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    shape = sizes if isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes) else None
    if dtype is None or shape is None or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        raise ServeError("A tensor is malformed", found=f"{name!r:.40}, shape {sizes!r:.60}")
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
