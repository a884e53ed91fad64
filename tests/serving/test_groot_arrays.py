"""GR00T's two forms of arrays: there and back, each told from the other, and whatever is malformed refused."""

from __future__ import annotations

import io
import sys
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import Limits
from prts_core.robot.groot_arrays import Dialect, ModalityConfig, decode, encode

DIALECTS = st.sampled_from(list(Dialect))
DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?"),
    npst.complex_number_dtypes(endianness="?"),
    npst.unicode_string_dtypes(max_len=5),
    npst.byte_string_dtypes(max_len=5),
)
ARRAYS = DTYPES.flatmap(lambda d: npst.arrays(d, npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)))


@given(ARRAYS, DIALECTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_arrays_come_back_equal(array: np.ndarray, dialect: Dialect, fortran: bool):
    sent = np.array(array, order="F" if fortran else "C")
    value, told = decode(encode({"x": [sent]}, dialect))
    (back,) = value["x"]
    assert told is dialect and back.dtype.str == array.dtype.str and back.shape == array.shape
    assert back.tobytes() == array.tobytes() and not back.flags.writeable


@given(ARRAYS)
@settings(max_examples=50, deadline=None)
def test_an_npy_file_is_what_numpy_writes(array: np.ndarray):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    raw = msgpack.unpackb(encode(array, Dialect.NPY))
    assert raw == {"__ndarray_class__": True, "as_npy": file.getvalue()}
    for version in ((1, 0), (2, 0), (3, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=version, allow_pickle=False)
        back = decode(msgpack.packb({"__ndarray_class__": 0, "as_npy": file.getvalue()}))[0]
        assert back.tobytes() == array.tobytes() and back.shape == array.shape


def test_a_message_without_arrays_has_no_dialect_and_configs_are_written_for_both():
    assert decode(encode({"a": [1, None, b"x"]})) == ({"a": [1, None, b"x"]}, None)
    config = ModalityConfig([0], ["x"], action_configs=[{"rep": "ABSOLUTE"}])
    raw = msgpack.unpackb(encode({"state": config}))["state"]
    assert {key for key in raw if raw[key] is True} == {each.value for each in Dialect}
    for dialect in Dialect:
        assert decode(encode({"state": config}, dialect)) == ({"state": config}, dialect)
    assert decode(encode({"state": config}))[0] == {"state": config}


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.zeros(2, "f4,f4"), np.void(b"x"), object(), {"a": {1}}, np.array(["a"], object), 2**70],
)
@pytest.mark.parametrize("dialect", [*Dialect, None])
def test_what_a_client_could_not_read_is_not_sent(value: Any, dialect: Dialect | None):
    with pytest.raises(ServeError):
        encode({"x": value}, dialect)


def test_scalars_travel_in_one_dialect_only():
    value = {"a": np.float32(0.5), "b": np.bool_(True), "c": 1 + 2j, "d": np.int64(-3)}
    assert decode(encode(value, Dialect.MSGPACK_NUMPY))[0] == value
    for name in value:
        with pytest.raises(ServeError):
            encode({name: value[name]}, Dialect.NPY)


def newer(**changes: Any) -> dict[bytes, Any]:
    good = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [2], b"data": b"\0" * 8}
    return good | {key.encode(): value for key, value in changes.items()}


def npy(header: bytes, data: bytes = b"\0" * 8, version: int = 1) -> dict[str, Any]:
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return {"__ndarray_class__": True, "as_npy": b"\x93NUMPY" + bytes([version, 0]) + size + header + data}


HEADER = b"{'descr': '%s', 'fortran_order': False, 'shape': %s, }\n"


@pytest.mark.parametrize(
    "item, told",
    [
        (newer(type="|O"), "not read"),
        (newer(type="|O", kind=b"O"), "not read"),
        (newer(type=b"|O8"), "not read"),
        (newer(type=[["i", "<i4"]], kind=b"V"), "no usable dtype"),
        (newer(type="|V4"), "not read"),
        (newer(type="<M8[D]", data=b"\0" * 16), "not read"),
        (newer(type="T"), "not read"),
        (newer(type=None), "no usable dtype"),
        (newer(shape=[-2]), "no usable shape"),
        (newer(shape=[3]), "do not fill"),
        (newer(shape=[2**40, 2**40]), "do not fill"),
        (newer(shape=2), "no usable shape"),
        (newer(shape=[1] * 7 + [2]), "no usable shape"),
        (newer(data="text"), "no data"),
        (newer(nd=False), "do not fill"),
        (newer(nd=False, type="|O", data=b"\1" * 8), "not read"),
        ({b"complex": True, b"data": "__import__('os')"}, "no complex number"),
        ({b"complex": True}, "no complex number"),
        (npy(HEADER % (b"|O", b"(1,)")), "not read"),
        (npy(HEADER % (b"|V8", b"(1,)")), "not read"),
        (npy(HEADER % (b"<f4", b"(-2,)")), "header"),
        (npy(HEADER % (b"<f4", b"(3,)")), "do not fill"),
        (npy(HEADER % (b"<f4", b"(2,)"), b"\0" * 9), "do not fill"),
        (npy(HEADER % (b"<f4", b"(2, 2 2)")), "not readable"),
        (npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }\n"), "header"),
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'more': 1}\n"), "header"),
        (npy(b"__import__('os').system('true')\n"), "header"),
        (npy(b"(" * 60_000), "header"),
        (npy(HEADER % (b"<f4", b"(2,)"), version=4), "no .npy"),
        ({"__ndarray_class__": True, "as_npy": b"\x93NUMPY\1\0\xff\xff"}, "no .npy"),
        ({"__ndarray_class__": True, "as_npy": b"\x93NUMPY\1\0\xff\xff{}"}, "header"),
        ({"__ndarray_class__": True, "as_npy": b"PK\3\4"}, "no .npy"),
        ({"__ndarray_class__": True, "as_npy": b""}, "no .npy"),
        ({"__ndarray_class__": True, "as_npy": "text"}, "no .npy"),
        ({"__ndarray_class__": True}, "no .npy"),
        ({"__ModalityConfig_class__": True}, "modality config"),
        ({"__ModalityConfig__": True, "as_json": {"nope": 1}}, "modality config"),
        ({"__ModalityConfig__": True, "as_json": {"delta_indices": ["a"], "modality_keys": []}}, "delta_indices"),
        ({"__ModalityConfig__": True, "as_json": {"delta_indices": [], "modality_keys": "x"}}, "modality_keys"),
    ],
)
def test_malformed_arrays_are_refused(item: dict[Any, Any], told: str):
    with pytest.raises(ServeError, match=told):
        decode(msgpack.packb({"x": item}))


def test_limits_count_for_both_dialects():
    message = encode({"x": np.zeros((1, 1, 1, 1, 1), np.float32)}, Dialect.NPY)
    for limits in (Limits(max_bytes=10), Limits(max_ndim=4), Limits(max_depth=0)):
        with pytest.raises(ServeError):
            decode(message, limits)


def test_no_pickle_is_loaded(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    file = io.BytesIO()
    np.save(file, np.array([Evil()], object), allow_pickle=True)
    for item in ({"__ndarray_class__": True, "as_npy": file.getvalue()}, newer(type="|O", data=pickle.dumps(Evil()))):
        with pytest.raises(ServeError, match="not read"):
            decode(msgpack.packb(item))
    assert not (tmp_path / "made").exists()


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_in_place_of_an_array_give_one_clear_error(data: bytes):
    for item in (
        {"__ndarray_class__": True, "as_npy": data},
        {"__ndarray_class__": 1, "as_npy": b"\x93NUMPY\1\0" + data},
    ):
        with pytest.raises(ServeError):
            decode(msgpack.packb(item))


def test_torch_is_not_imported():
    import subprocess

    code = "import sys, prts_core.serving.protocols.groot, prts_core.robot.groot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
