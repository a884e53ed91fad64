"""LIBERO's stored initial states: from the file it ships (a torch archive with a pickle inside) to one plain array.

The pickle is never executed: its instructions are read one by one (`pickletools` only lists them) by a machine that
knows how numpy writes an array and refuses everything else.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import DataError

MAX_BYTES = 64 * 2**20  # of the pickle; LIBERO's are below 1 MiB
_RECONSTRUCT, _DTYPE, _ENCODE, _NDARRAY = "numpy _reconstruct", "numpy dtype", "_codecs encode", "numpy ndarray"
_ALLOWED = {
    "numpy.core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy dtype": _DTYPE,
    "numpy ndarray": _NDARRAY,
    "_codecs encode": _ENCODE,
}
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Made:
    """An array or a dtype while its instructions arrive."""

    def __init__(self, kind: str, value: Any = None) -> None:
        self.kind, self.value = kind, value


def read_init_states(path: Path) -> np.ndarray:
    """(N, 1 + nq + nv) float64: time, positions, velocities of N initial states.

    Raises DataError for a file that is no such archive, asks for anything but a numpy array of float64, or holds a
    number that is not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            if archive.getinfo(name).file_size > MAX_BYTES:
                raise DataError("A file of initial states is too large", file=path, expected=f"{MAX_BYTES} bytes")
            data = archive.read(name)
    except FileNotFoundError as err:
        raise DataError("A file of initial states is missing", file=path, cure="install the simulator again") from err
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as err:
        raise DataError("A file of initial states is no torch archive", file=path, found=str(err)[:200]) from err
    states = _interpret(data, path)
    if states.ndim != 2 or 0 in states.shape or not np.isfinite(states).all():
        raise DataError(
            "Initial states are not a table of finite numbers",
            file=path,
            found=f"shape {states.shape}",
            expected="(states, 1 + nq + nv), finite",
        )
    return states


def _interpret(data: bytes, path: Path) -> np.ndarray:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(io.BytesIO(data)):
            name = code.name
            if name == "STOP":
                break
            if name == "PROTO":
                continue
            if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _VALUES:
                stack.append(argument)
            elif name == "GLOBAL":
                if argument not in _ALLOWED:
                    raise _refused(path, f"it asks for {argument!r}")
                stack.append(_Made("global", _ALLOWED[argument]))
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "TUPLE":
                start = len(stack) - 1 - stack[::-1].index(_MARK)
                stack[start:] = [tuple(stack[start + 1 :])]
            elif name in _TUPLES:
                stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_call(called, arguments, path))
            elif name == "BUILD":
                _build(stack[-2], stack.pop(), path)
            else:
                raise _refused(path, f"it holds the instruction {name}")
        (made,) = stack
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError) as err:
        raise _refused(path, f"its instructions do not fit together ({type(err).__name__}: {str(err)[:120]})") from err
    if not isinstance(made, _Made) or not isinstance(made.value, np.ndarray):
        raise _refused(path, "it does not end in an array")
    return made.value


def _call(called: Any, arguments: Any, path: Path) -> Any:
    kind = called.value if isinstance(called, _Made) and called.kind == "global" else None
    if kind == _ENCODE:
        text, encoding = arguments
        if encoding != "latin1" or not isinstance(text, str):
            raise _refused(path, f"it encodes by {encoding!r}")
        return text.encode("latin1")
    if kind == _DTYPE:
        if arguments[0] != "f8":
            raise _refused(path, f"its numbers are {arguments[0]!r}, not float64")
        return _Made("dtype")
    if kind == _RECONSTRUCT:
        return _Made("array")
    raise _refused(path, f"it calls {kind!r}")


def _build(made: Any, state: Any, path: Path) -> None:
    kind = made.kind if isinstance(made, _Made) else None
    if kind == "dtype":
        if state[1] != "<":
            raise _refused(path, f"its byte order is {state[1]!r}")
        return
    if kind != "array":
        raise _refused(path, f"it changes a {kind!r}")
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _Made) or dtype.kind != "dtype" or not isinstance(raw, bytes):
        raise _refused(path, "its array has no plain bytes")
    made.value = np.frombuffer(raw, "<f8").reshape(shape, order="F" if fortran else "C").copy()


def _refused(path: Path, found: str) -> DataError:
    return DataError(
        "A file of initial states is refused; nothing in it was executed",
        file=path,
        found=found,
        expected="one numpy array of float64",
        cure="install LIBERO's own files again",
    )
