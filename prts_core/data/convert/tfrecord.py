"""TFRecord files and the tf.train.Example records in them, read without TensorFlow; every checksum is checked.

A file is a run of records: length (uint64), masked crc32c of the length, payload, masked crc32c of the payload, all
little endian (the format of tensorflow/core/lib/io/record_writer).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import DataError, require

EXTRA = "rlds"
_HEAD, _TAIL = struct.Struct("<QI"), struct.Struct("<I")
_CURE = "download the file again: it was cut or changed on its way"


@dataclass(frozen=True)
class RecordPosition:
    """Where one record lies: offset of its first byte, size of its payload in bytes."""

    offset: int
    size: int


def masked_crc(data: bytes) -> int:
    """crc32c of `data`, rotated right by 15 bits plus a constant: a checksum that may itself be checksummed."""
    crc = require("google_crc32c", EXTRA).value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> Iterator[tuple[RecordPosition, bytes]]:
    """Every record of `path` in order, one in memory at a time. Raises DataError at the first damage."""
    try:
        with path.open("rb") as file:
            end = path.stat().st_size
            while file.tell() < end:
                place = RecordPosition(file.tell(), _length(file, path, end))
                yield place, _payload(file, path, place)
    except FileNotFoundError as err:
        raise DataError("A TFRecord file is missing", file=path, cure="download it again") from err


def record_at(path: Path, place: RecordPosition) -> bytes:
    """The payload at a place that `records` gave; a DataError where the file has changed since."""
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            if _length(file, path, path.stat().st_size) != place.size:
                raise DataError("A file has changed while it was converted", file=path, cure="run the command again")
            return _payload(file, path, place)
    except FileNotFoundError as err:
        raise DataError("A TFRecord file is missing", file=path, cure="download it again") from err


def _length(file: Any, path: Path, end: int) -> int:
    offset = file.tell()
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise _damaged(path, offset, f"{len(head)} bytes of a record's head", f"{_HEAD.size} bytes")
    length, crc = _HEAD.unpack(head)
    if masked_crc(head[:8]) != crc:
        raise _damaged(path, offset, "a length whose checksum is wrong", "a TFRecord file, uncompressed")
    if offset + _HEAD.size + length + _TAIL.size > end:
        left = end - offset - _HEAD.size
        raise _damaged(path, offset, f"a record of {length} bytes, of which {left} are there", "whole records")
    return length


def _payload(file: Any, path: Path, place: RecordPosition) -> bytes:
    data, tail = file.read(place.size), file.read(_TAIL.size)
    if len(data) < place.size or len(tail) < _TAIL.size:
        raise _damaged(path, place.offset, "a record that ends early", f"{place.size} bytes and a checksum")
    if masked_crc(data) != _TAIL.unpack(tail)[0]:
        raise _damaged(path, place.offset, "a record whose checksum is wrong", "the bytes that were written")
    return data


def _damaged(path: Path, offset: int, found: str, expected: str) -> DataError:
    return DataError(
        "A TFRecord file is damaged", file=path, field=f"byte {offset}", found=found, expected=expected, cure=_CURE
    )


# ---- tf.train.Example ----------------------------------------------------------------------------------------------
@cache
def example_class() -> type:
    """The message class of tf.train.Example, made from a descriptor of our own in a pool of its own."""
    require("google.protobuf", EXTRA)
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="prts/example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        made = file.message_type.add(name=name)
        for field, number, label, kind, type_name in fields:
            made.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)
        return made

    many, one = kinds.LABEL_REPEATED, kinds.LABEL_OPTIONAL
    message("BytesList", ("value", 1, many, kinds.TYPE_BYTES, ""))
    message("FloatList", ("value", 1, many, kinds.TYPE_FLOAT, ""))
    message("Int64List", ("value", 1, many, kinds.TYPE_INT64, ""))
    feature = message(
        "Feature",
        ("bytes_list", 1, one, kinds.TYPE_MESSAGE, ".tensorflow.BytesList"),
        ("float_list", 2, one, kinds.TYPE_MESSAGE, ".tensorflow.FloatList"),
        ("int64_list", 3, one, kinds.TYPE_MESSAGE, ".tensorflow.Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", ("feature", 1, many, kinds.TYPE_MESSAGE, ".tensorflow.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=kinds.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=kinds.TYPE_MESSAGE, type_name=".tensorflow.Feature")
    message("Example", ("features", 1, one, kinds.TYPE_MESSAGE, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def parse_example(data: bytes, path: Path, place: RecordPosition) -> dict[str, Any]:
    """{feature name: its list} of one record: repeated bytes, or numpy float32 / int64, () where it is empty."""
    from google.protobuf.message import DecodeError

    message = example_class()()
    try:
        message.ParseFromString(data)
    except DecodeError as err:
        raise DataError(
            "A record is no tf.train.Example",
            file=path,
            field=f"byte {place.offset}",
            found=" ".join(str(err).split())[:200],
            expected="episodes as tensorflow_datasets writes them",
        ) from err
    return {name: _values(feature) for name, feature in message.features.feature.items()}


def _values(feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list":
        return list(feature.bytes_list.value)
    if kind == "float_list":
        return np.array(feature.float_list.value, np.float32)
    return np.array(feature.int64_list.value if kind else (), np.int64)
