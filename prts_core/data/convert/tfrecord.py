"""Read TFRecord files and the tf.train.Example records in them without TensorFlow; every checksum is checked.

A file is a run of records: length (uint64), masked crc32c of the length, payload, masked crc32c of the payload, all
little endian (the format of tensorflow/core/lib/io/record_writer).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

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
    with _opened(path) as file:
        end = path.stat().st_size
        while file.tell() < end:
            place = RecordPosition(file.tell(), _length(file, path, end))
            yield place, _payload(file, path, place)


def record_at(path: Path, place: RecordPosition) -> bytes:
    """The payload at a place that `records` gave; a DataError where the file has changed since."""
    with _opened(path) as file:
        file.seek(place.offset)
        if _length(file, path, path.stat().st_size) != place.size:
            raise DataError("A file has changed while it was converted", file=path, cure="run the command again")
        return _payload(file, path, place)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
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
_PROTO = """
name: "prts/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_MESSAGE
    type_name: ".tensorflow.BytesList" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_MESSAGE
    type_name: ".tensorflow.FloatList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL oneof_index: 0 type: TYPE_MESSAGE
    type_name: ".tensorflow.Int64List" }
}
message_type { name: "Features"
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.Feature" }
  }
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.Features.FeatureEntry" }
}
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".tensorflow.Features" }
}
"""


@cache
def example_class() -> type:
    """The message class of tf.train.Example, from a descriptor of our own in a pool of its own."""
    require("google.protobuf", EXTRA)
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto()))
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
