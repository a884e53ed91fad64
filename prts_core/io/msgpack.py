"""Bytes on the wire: MessagePack with openpi's form of arrays. No pickle; nothing is built but plain values and arrays.

An array is {b"__ndarray__": true, b"data": bytes, b"dtype": "<f4", b"shape": [..]} in C order, a numpy scalar is
{b"__npgeneric__": true, b"data": value, b"dtype": "<f4"}. Object, void and complex dtypes are refused both ways. Other
forms of arrays are two functions handed to `pack` and `unpack` (robot/groot_arrays.py has two of them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np

from .errors import ServeError

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
KINDS = "biufSUmM"  # of numpy dtypes: what neither points into memory nor has parts


@dataclass(frozen=True)
class Limits:
    """What a message may be: bytes, nesting, dimensions of an array, entries of a container, characters of a text."""

    max_bytes: int = 16 * 2**20
    max_depth: int = 6
    max_ndim: int = 6
    max_items: int = 4096
    max_text: int = 65_536


LIMITS = Limits()


def pack_openpi(value: Any) -> Any:
    """What stands for `value`, which MessagePack has no form for. Raises ServeError for what openpi could not read."""
    if isinstance(value, np.ndarray | np.generic):
        require_kind(value.dtype)
    if isinstance(value, np.ndarray):
        return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ServeError("This type is not sent", found=type(value).__name__, expected="plain values and numpy arrays")


def pack(value: Any, form: Callable[[Any], Any] = pack_openpi) -> bytes:
    """One message. form: what stands for a value that MessagePack does not know. ServeError for what cannot be sent."""
    try:
        return msgpack.packb(value, default=form)
    except ServeError:
        raise
    except (TypeError, ValueError, OverflowError) as err:  # integers beyond 64 bits, and what nests too deep
        raise ServeError(
            "This value is not sent", found=f"{type(err).__name__}: {err}"[:160], expected="plain values and arrays"
        ) from err


def unpack_openpi(item: dict[Any, Any], limits: Limits) -> Any:
    """The array or scalar that a map stands for in openpi's form, or the map itself."""
    if ARRAY in item:
        return read_array(item.get(b"dtype"), item.get(b"shape"), item.get(b"data"), limits)
    if SCALAR in item:
        dtype, raw = read_dtype(item.get(b"dtype")), item.get(b"data")
        if not isinstance(raw, bool | int | float | str | bytes):
            raise ServeError("A scalar has no plain value", field="data", found=type(raw).__name__)
        try:
            return dtype.type(raw)
        except (ValueError, TypeError, OverflowError) as err:
            raise ServeError("A scalar does not fit its dtype", found=f"{raw!r:.60}", expected=str(dtype)) from err
    return item


def unpack(data: bytes, limits: Limits = LIMITS, form: Callable[[dict[Any, Any], Limits], Any] = unpack_openpi) -> Any:
    """The message in `data`; arrays are read-only views of it. ServeError for anything malformed or too large.

    form: called with every map, innermost first; what it returns stands in the map's place.
    """
    if len(data) > limits.max_bytes:
        raise ServeError("A message is too large", found=f"{len(data)} bytes", expected=f"at most {limits.max_bytes}")
    try:
        value = msgpack.unpackb(
            data,
            object_hook=lambda item: form(item, limits),
            ext_hook=_refuse_extension,
            max_str_len=limits.max_text,
            max_array_len=limits.max_items,
            max_map_len=limits.max_items,
            max_ext_len=0,
        )
    except ServeError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as err:
        # msgpack's own faults (truncated, nested too deep, too long, keys that are no text) all derive from these
        raise ServeError(
            "A message is not readable MessagePack",
            found=f"{type(err).__name__}: {str(err)[:120]}",
            expected=f"one value, containers of at most {limits.max_items} entries",
        ) from err
    _check_depth(value, limits)
    return value


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ServeError("A message holds an extension type", found=code, expected="plain MessagePack")


def _check_depth(value: Any, limits: Limits) -> None:
    level, depth = [value], 0
    while level:
        if depth > limits.max_depth:
            raise ServeError("A message nests too deep", found=f"more than {limits.max_depth} levels")
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1


def read_array(
    dtype: Any, shape: Any, data: Any, limits: Limits, kinds: str = KINDS, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """An array as a message gives it: the name of a dtype, a list of sizes, bytes. ServeError unless they fit exactly.

    The dtype is judged before anything is read: numpy would follow bytes as pointers where they are said to be objects.
    """
    made = read_dtype(dtype, kinds)
    if not isinstance(shape, list) or len(shape) > limits.max_ndim or any(type(n) is not int or n < 0 for n in shape):
        raise ServeError(
            "An array has no usable shape",
            field="shape",
            found=f"{shape!r:.80}",
            expected=f"at most {limits.max_ndim} sizes, none negative",
        )
    if not isinstance(data, bytes | memoryview):
        raise ServeError("An array has no data", field="data", found=type(data).__name__, expected="bytes")
    if made.itemsize == 0 or math.prod(shape) * made.itemsize != len(data):
        raise ServeError(
            "An array's data do not fill its shape",
            field="data",
            found=f"{len(data)} bytes",
            expected=f"{math.prod(shape)} values of {made.str}",
        )
    return np.frombuffer(data, made).reshape(shape, order=order)


def read_dtype(text: Any, kinds: str = KINDS) -> np.dtype:
    """The dtype of that name. ServeError unless its kind is one of `kinds`."""
    if isinstance(text, bytes):
        text = text.decode("ascii", "replace")
    if not isinstance(text, str) or len(text) > 12:
        raise ServeError("An array has no usable dtype", field="dtype", found=f"{text!r:.60}")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, SyntaxError) as err:
        raise ServeError("An array has an unknown dtype", field="dtype", found=text) from err
    return require_kind(dtype, kinds)


def require_kind(dtype: np.dtype, kinds: str = KINDS) -> np.dtype:
    """`dtype`, or ServeError unless its kind is one of `kinds`."""
    if dtype.kind not in kinds:
        raise ServeError(
            "This dtype is not read or sent", field="dtype", found=str(dtype), expected="bool, numbers or text"
        )
    return dtype
