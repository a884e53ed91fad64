"""Turn GR00T's two forms of arrays into numpy and back; a reader takes both, a writer is told which.

npy (N1.6, N1.7 as released, RLDX-1): {"__ndarray_class__": true, "as_npy": bytes of a .npy file}. Torch tensors travel
as arrays, bfloat16 and float16 widened to float32, so that no torch is needed here.
msgpack-numpy (N1.7 since May 2026): {b"nd": true, b"type": "<f4", b"kind": b"", b"shape": [..], b"data": bytes} in C
order; scalars have b"nd" false and no shape, complex numbers b"complex". Both have a form for modality configs too.

Objects and structured dtypes are refused both ways, by the name of the dtype, before any byte is read: the references
follow such bytes as pointers, and one frame ends their process. Arrays that come out are read-only views.
"""

from __future__ import annotations

import io
import re
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import numpy as np

from ..io.errors import ServeError
from ..io.msgpack import KINDS, LIMITS, Limits, pack, read_array, require_kind, unpack

NPY_MARK, NPY_DATA = "__ndarray_class__", "as_npy"
ND, COMPLEX = b"nd", b"complex"
PLAIN = "as_json"
# A .npy file: magic, version (2 bytes), length of the header (2 or 4 bytes, little endian), header, data.
NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = re.compile(
    rb"\{\s*'descr':\s*'([^']{1,12})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([\d, ]{0,200})\),?\s*\}\s*"
)


class Dialect(Enum):
    """Which form arrays have. The value is the marker of a modality config in it."""

    NPY = "__ModalityConfig_class__"
    MSGPACK_NUMPY = "__ModalityConfig__"

    @property
    def kinds(self) -> str:
        """Of dtypes: those its own serializer writes, less objects and structures."""
        return KINDS + "c" if self is Dialect.NPY else KINDS.replace("m", "").replace("M", "") + "c"


@dataclass(frozen=True)
class ModalityConfig:
    """GR00T's record of one modality: time steps relative to now, and keys. action_configs: one map a key, or none."""

    delta_indices: list[int]
    modality_keys: list[str]
    sin_cos_embedding_keys: list[str] | None = None
    mean_std_embedding_keys: list[str] | None = None
    action_configs: list[dict[str, Any]] | None = None

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_plain(raw: Any) -> ModalityConfig:
        """ServeError unless `raw` is what `to_plain` gives, as far as a client may rely on it."""
        known = [field.name for field in fields(ModalityConfig)]
        if not isinstance(raw, dict) or not set(known[:2]) <= set(raw) <= set(known):
            found = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
            raise ServeError("A modality config is malformed", found=found[:200], expected=", ".join(known))
        for name, kind in (("delta_indices", int), ("modality_keys", str)):
            if not isinstance(raw[name], list) or not all(type(item) is kind for item in raw[name]):
                raise ServeError(
                    "A modality config is malformed", field=name, found=f"{raw[name]!r:.80}", expected=f"{kind}s"
                )
        return ModalityConfig(**raw)


def encode(value: Any, dialect: Dialect | None = None) -> bytes:
    """One message. Without a dialect arrays are npy, and modality configs have the markers of both dialects.

    Raises ServeError for what the dialect has no form for.
    """

    def form(item: Any) -> Any:
        if isinstance(item, ModalityConfig):
            return {each.value: True for each in ([dialect] if dialect else Dialect)} | {PLAIN: item.to_plain()}
        if isinstance(item, np.ndarray | np.generic):
            require_kind(item.dtype, (dialect or Dialect.NPY).kinds)
        if dialect is Dialect.MSGPACK_NUMPY:
            if isinstance(item, np.ndarray):
                shape, data = item.shape, item.tobytes()
                return {ND: True, b"type": item.dtype.str, b"kind": b"", b"shape": shape, b"data": data}
            if isinstance(item, np.number | np.bool_):
                return {ND: False, b"type": item.dtype.str, b"data": item.tobytes()}
            if isinstance(item, complex):
                return {COMPLEX: True, b"data": repr(item)}
        elif isinstance(item, np.ndarray):
            file = io.BytesIO()
            np.lib.format.write_array(file, item, allow_pickle=False)
            return {NPY_MARK: True, NPY_DATA: file.getvalue()}
        raise ServeError("This type is not sent", found=type(item).__name__, expected="plain values and numpy arrays")

    return pack(value, form)


def decode(data: bytes, limits: Limits = LIMITS) -> tuple[Any, Dialect | None]:
    """The message, and the dialect of what it holds; none where it holds neither arrays nor modality configs.

    Raises ServeError for anything malformed, too large or of another dtype than bool, numbers, text and times.
    """
    seen: list[Dialect] = []

    def form(item: dict[Any, Any], limits: Limits) -> Any:
        found = _read(item, limits)
        if found is None:
            return item
        seen.append(found[1])
        return found[0]

    value = unpack(data, limits, form)
    return value, seen[0] if seen else None


def _read(item: dict[Any, Any], limits: Limits) -> tuple[Any, Dialect] | None:
    """What a map stands for; none for a map that is one."""
    if NPY_MARK in item:
        return _npy(item.get(NPY_DATA), limits), Dialect.NPY
    newer = Dialect.MSGPACK_NUMPY
    if ND in item:
        if item[ND] is True:
            shape, data = item.get(b"shape"), item.get(b"data")
            data = data.tobytes() if isinstance(data, np.ndarray) else data  # of a masked array, whose mask is lost
            return read_array(item.get(b"type"), shape, data, limits, newer.kinds), newer
        return read_array(item.get(b"type"), [], item.get(b"data"), limits, newer.kinds)[()], newer
    if COMPLEX in item:
        text = item.get(b"data")
        try:
            return complex(text if isinstance(text, str) else ""), newer
        except ValueError as err:
            raise ServeError("This is no complex number", field="data", found=f"{text!r:.40}") from err
    for dialect in Dialect:
        if dialect.value in item:
            return ModalityConfig.from_plain(item.get(PLAIN)), dialect
    return None


def _npy(data: Any, limits: Limits) -> np.ndarray:
    """The array in a .npy file. Its header is matched as text, nothing in it is evaluated."""
    if not isinstance(data, bytes) or not data.startswith(NPY_MAGIC) or len(data) < 12 or data[6] not in (1, 2, 3):
        raise ServeError(
            "An array is no .npy file", field=NPY_DATA, found=f"{data!r:.40}", expected="what numpy.save writes"
        )
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    header = NPY_HEADER.fullmatch(data[start : min(end, start + 1024)])
    if header is None or end > len(data):
        found = f"{data[start : start + 80]!r}"
        raise ServeError("The header of an .npy file is not read", field=NPY_DATA, found=found, expected="plain dtype")
    descr, fortran, sizes = header.groups()
    shape = [int(size) for size in sizes.split(b",") if size.strip()]
    body, kinds = memoryview(data)[end:], Dialect.NPY.kinds
    return read_array(descr, shape, body, limits, kinds, "F" if fortran == b"True" else "C")
