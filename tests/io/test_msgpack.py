"""The wire form: openpi's bytes exactly, there and back, and everything else refused."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import Limits, pack, unpack

dtypes = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?"),
    npst.unicode_string_dtypes(max_len=5),
)
arrays = dtypes.flatmap(lambda d: npst.arrays(d, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))


@given(arrays)
@settings(max_examples=100)
def test_arrays_come_back_equal(array):
    back = unpack(pack({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_the_bytes_are_openpis():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    raw = msgpack.unpackb(pack({"a": array, "s": np.float32(0.5)}))
    assert raw["a"] == {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": "<f4", b"shape": [2, 3]}
    assert raw["s"] == {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}
    scalar = unpack(pack({"s": np.int16(7)}))["s"]
    assert isinstance(scalar, np.int16) and scalar == 7


def test_views_are_packed_in_c_order():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.testing.assert_array_equal(unpack(pack(array.T)), array.T)
    np.testing.assert_array_equal(unpack(pack(array[:, ::2])), array[:, ::2])


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.zeros(2, np.complex64), np.zeros(2, "f4,f4"), np.complex128(1), object(), {"a": {1, 2}}],
)
def test_what_openpi_cannot_read_is_not_sent(value):
    with pytest.raises(ServeError):
        pack(value)


def forged(**changes) -> bytes:
    good = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"x": good | {key.encode(): value for key, value in changes.items()}})


@pytest.mark.parametrize(
    "data, told",
    [
        (forged(dtype="|O"), "not read"),
        (forged(dtype="f4,f4"), "not read"),
        (forged(dtype="(2,)f4"), "not read"),
        (forged(dtype="<c8"), "not read"),
        (forged(dtype="|V8"), "not read"),
        (forged(dtype="nonsense"), "unknown dtype"),
        (forged(dtype=b"<f4" * 100), "no usable dtype"),
        (forged(dtype=None), "no usable dtype"),
        (forged(shape=[3]), "do not fill"),
        (forged(shape=[2**62, 2**62]), "do not fill"),
        (forged(shape=[-2]), "no usable shape"),
        (forged(shape=[True, 2]), "no usable shape"),
        (forged(shape=[1] * 20 + [2]), "no usable shape"),
        (forged(shape=2), "no usable shape"),
        (forged(data="text"), "has no data"),
        (forged(dtype="|S0", data=b"", shape=[10]), "do not fill"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}}), "no plain value"),
        (msgpack.packb({"x": {b"__npgeneric__": True, b"data": "a", b"dtype": "<f4"}}), "does not fit"),
        (msgpack.packb({"x": msgpack.ExtType(5, b"abc")}), "not readable"),
        (msgpack.packb(msgpack.Timestamp(1, 2)), "not readable"),
        (msgpack.packb({1: 2}), "not readable"),
        (b"\x93\x01", "not readable"),
        (b"", "not readable"),
        (b"\xc1", "not readable"),
        (msgpack.packb(1) * 2, "not readable"),
        (b"\x91" * 20 + b"\x01", "nests too deep"),
        (b"\x91" * 5000 + b"\x01", "not readable"),
        (msgpack.packb(list(range(5000))), "not readable"),
        (msgpack.packb("x" * 100_000), "not readable"),
        (b"\xdd\xff\xff\xff\xff", "not readable"),
    ],
)
def test_malformed_messages_are_refused(data, told):
    with pytest.raises(ServeError, match=told):
        unpack(data)


def test_a_pickle_is_never_loaded(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    with pytest.raises(ServeError):
        unpack(pickle.dumps(Evil()))
    with pytest.raises(ServeError):
        unpack(msgpack.packb({b"__ndarray__": True, b"data": pickle.dumps(Evil()), b"dtype": "|O", b"shape": [1]}))
    assert not (tmp_path / "made").exists()


def test_large_messages_are_refused_before_they_are_read():
    with pytest.raises(ServeError, match="too large"):
        unpack(b"\xc1" * 100, Limits(max_bytes=99))


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_give_a_value_or_one_clear_error(data):
    try:
        value = unpack(data)
    except ServeError as err:
        assert err.problem
    else:
        assert value is None or isinstance(value, (bool, int, float, str, bytes, list, dict, np.ndarray, np.generic))
