"""The golden frames of the serving protocols, read as their README says: bytes on one side, meaning on the other."""

from __future__ import annotations

import ast
import base64
import datetime
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.robot.groot_arrays import Dialect, ModalityConfig

OTHERS = {
    "complex": 1 + 2j,
    "datetime": datetime.datetime(2026, 1, 2),
    "set": {1},
    "memoryview": memoryview(b"abc"),
}


def wire_folder() -> Path:
    return shared_folder() / "golden" / "wire"


def folders() -> list[str]:
    """Those with frames; the one that the README names first where there are none."""
    found = sorted(path.name for path in wire_folder().glob("*/") if any(path.glob("*.bin")))
    return found or ["openpi"]


def dialect_of(name: str) -> Dialect:
    """Of a folder or transcript of GR00T's protocol."""
    return Dialect.MSGPACK_NUMPY if "msgpack_numpy" in name else Dialect.NPY


def names(folder: str) -> list[str]:
    """The cases of a folder; one that is skipped, with the reason, where there is none."""
    return sorted(path.stem for path in (wire_folder() / folder).glob("*.json")) or ["absent"]


@dataclass
class Frame:
    """frame: its bytes; none where the reference refuses to encode. told: the record beside it."""

    told: dict[str, Any]
    frame: bytes | None

    @property
    def structured(self) -> bool:
        return '"dtype": "[(' in json.dumps(self.told)

    @property
    def decoded(self) -> Any:
        """What the frame means to the reference's own decoder."""
        told = self.told["encoded_from"] if self.told["decodes_to"] == "same" else self.told["decodes_to"]
        return meaning(told, any(layout["f_contiguous"] for layout in self.told.get("decoded_layouts", [])))

    @property
    def encoded(self) -> Any:
        return meaning(self.told["encoded_from"], False)


def load(folder: str, name: str) -> Frame:
    path = wire_folder() / folder / f"{name}.json"
    if not path.exists():
        pytest.skip(f"golden frames are absent: set PRTS_SHARED to a folder that has golden/wire/{folder}")
    binary = path.with_suffix(".bin")
    return Frame(json.loads(path.read_text()), binary.read_bytes() if binary.exists() else None)


def transcript(name: str) -> Any:
    path = wire_folder() / "transcripts" / f"{name}.json"
    if not path.exists():
        pytest.skip(
            f"golden transcripts are absent: set PRTS_SHARED to a folder that has golden/wire/transcripts/{name}"
        )
    return json.loads(path.read_text())


def meaning(told: Any, fortran: bool) -> Any:
    """The value that a structure of the README's forms stands for."""
    if isinstance(told, list):
        return [meaning(item, fortran) for item in told]
    if not isinstance(told, dict):
        return told
    if len(told) == 1 and next(iter(told)).startswith("$"):
        ((form, inner),) = told.items()
        return _special(form, inner, fortran)
    return {key: meaning(value, fortran) for key, value in told.items()}


def _special(form: str, told: Any, fortran: bool) -> Any:
    if form == "$array":
        array = _array(told)
        return np.asfortranarray(array) if fortran else array
    if form == "$scalar":
        dtype, value = np.dtype(told["dtype"]), re.sub(r"^np\.\w+\('(.*)'\)$", r"\1", told["value"])
        return np.datetime64("2026-01-02") if dtype.kind == "M" else dtype.type(ast.literal_eval(value))
    if form == "$ModalityConfig":
        return ModalityConfig(**told)
    if form == "$tuple":
        return tuple(meaning(told, fortran))
    if form == "$bytes":
        return base64.b64decode(told)
    if form == "$float":
        return float(told)
    if form == "$dict":
        return {meaning(key, fortran): meaning(value, fortran) for key, value in told}
    if form == "$object_array":
        return np.array([ast.literal_eval(text) for text in told], object)
    if form == "$other":
        return OTHERS[told]
    raise AssertionError(f"an unknown form {form}")


def _array(told: dict[str, Any]) -> np.ndarray:
    name, shape = told["dtype"], told["shape"]
    dtype = np.dtype(ast.literal_eval(name) if name.startswith("[") else name)
    if "b64" in told:
        return np.frombuffer(base64.b64decode(told["b64"]), dtype).reshape(shape)
    *factors, constant = told["formula"]["k"]
    places = np.indices(shape)
    sums = constant + sum(k * i for k, i in zip(factors, places, strict=True)) + np.prod(places, axis=0) % 251
    array = (sums % 256).astype(dtype)
    assert hashlib.sha256(array.tobytes()).hexdigest() == told["sha256"]
    return array


def equal(left: Any, right: Any) -> bool:
    """The same value: of arrays dtype, shape and bits, of numbers the type."""
    if isinstance(left, np.ndarray | np.generic):
        return (
            isinstance(right, np.ndarray) == isinstance(left, np.ndarray)
            and isinstance(right, np.ndarray | np.generic)
            and (left.dtype.str, left.shape) == (right.dtype.str, right.shape)
            and (left.tobytes() == right.tobytes() if left.dtype.str != "<f16" else bool((left == right).all()))
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        same = isinstance(right, list | tuple) and len(left) == len(right)
        return same and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and (left == right or (left != left and right != right))
