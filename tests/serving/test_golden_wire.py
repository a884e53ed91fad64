"""Every golden frame decodes to what it means and is encoded to the same bytes; fatal ones harm nobody."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.io.msgpack import pack, unpack
from prts_core.robot.groot_arrays import decode, encode
from tests.serving.golden_wire import dialect_of, equal, folders, load, names, transcript

CASES = [(folder, name) for folder in folders() for name in names(folder)]


def forms(folder: str) -> tuple[Callable[[bytes], Any], Callable[[Any], bytes]]:
    """How frames of a folder are read and written."""
    if folder == "openpi":
        return unpack, pack
    return lambda data: decode(data)[0], lambda value: encode(value, dialect_of(folder))


@pytest.mark.parametrize("folder, name", CASES)
def test_a_frame_is_read_and_written_as_by_its_reference(folder: str, name: str):
    case = load(folder, name)
    read, write = forms(folder)
    if "encode_error" in case.told:
        with pytest.raises(ServeError):
            write(case.encoded)
        return
    if case.frame is None:
        assert case.told["kind"] == "error"  # openpi's text frame, a traceback; we send a paragraph in its place
        return
    if "decode_error" in case.told:
        with pytest.raises(ServeError):
            read(case.frame)
        return
    if case.structured:  # both references read dtypes with parts; we do not
        for refused in (lambda: read(case.frame), lambda: write(case.encoded)):
            with pytest.raises(ServeError):
                refused()
        return
    found = read(case.frame)
    assert equal(found, case.decoded), (found, case.decoded)
    if case.told["note"] == "the mask is lost" and b"data\x85" in case.frame:
        return  # msgpack-numpy packs what is under a mask as an array within the array; we send no masks
    assert write(found) == case.frame
    assert b"<f16" in case.frame or write(case.decoded) == case.frame  # six bytes of a long double mean nothing


@pytest.mark.parametrize("folder", [folder for folder in folders() if folder != "openpi"])
def test_the_dialect_of_a_frame_is_told_where_it_shows(folder: str):
    shown = set()
    for name in names(folder):
        case = load(folder, name)
        if case.frame is None or "decode_error" in case.told or case.structured:
            continue
        dialect = decode(case.frame)[1]
        assert dialect in (None, dialect_of(folder)), name
        shown.add(dialect)
    assert shown == {None, dialect_of(folder)}


def test_tensors_arrive_without_torch():
    cases = [load("rldx", name) for name in names("rldx") if name.startswith("torch_")]
    assert cases or names("rldx") == ["absent"]
    for case in cases:
        (array,) = decode(case.frame)[0].values()
        assert isinstance(array, np.ndarray)


@pytest.mark.parametrize("reader", [unpack, decode], ids=["openpi", "groot"])
def test_frames_that_end_a_reference_are_refused_or_hold_no_objects(reader: Callable[[bytes], Any]):
    def leaves(value: Any) -> list[Any]:
        if isinstance(value, dict | list | tuple):
            return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
        return [value]

    refused = 0
    for case in transcript("fatal_frames"):
        try:
            value = reader(base64.b64decode(case["frame"]))
        except ServeError as err:
            refused += 1
            assert "dtype" in str(err)
        else:  # of the other protocol: a plain map to this one
            assert all(not isinstance(leaf, np.ndarray | np.generic) for leaf in leaves(value))
    assert refused >= 2
