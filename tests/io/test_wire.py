"""Values on their way between processes: they come out as they went in, and nothing else travels."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prts_core.io.errors import DataError
from prts_core.io.wire import LENGTH, Frames, encode, values
from tests.fixtures.toy_collector import same

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_]), hnp.array_shapes(min_dims=0, min_side=0)
)
tensors = st.builds(
    lambda dtype, shape, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 99),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
anything = st.recursive(plain | arrays | tensors, lambda inner: st.dictionaries(st.text(), inner, max_size=3))


@given(st.lists(anything, max_size=3), st.integers(1, 50))
def test_values_come_out_as_they_went_in(sent: list[Any], piece: int):
    data, frames, came = b"".join(map(encode, sent)), Frames(), []
    for at in range(0, len(data), piece):
        came += frames.feed(data[at : at + piece])
    assert same(came, sent) and not frames.buffer


@dataclass(frozen=True)
class Order:
    task: str
    at: tuple[int, ...]
    inner: Any = None


def test_dataclasses_and_tuples_come_out_as_mappings_and_lists():
    (came,) = Frames().feed(encode(Order("push", (1, 2), Order("pull", ()))))
    assert came == {"task": "push", "at": [1, 2], "inner": {"task": "pull", "at": [], "inner": None}}


def test_a_tensor_is_the_receivers_own():
    turned = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    (came,) = Frames().feed(encode({"a": turned}))
    assert torch.equal(came["a"], turned) and not came["a"].requires_grad
    came["a"] += 1.0


@pytest.mark.parametrize(
    "value",
    [
        {1: 2},
        {"a": object()},
        {1, 2},
        [lambda: 0],
        np.array([object()]),
        2**70,
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        Order,
    ],
)
def test_what_cannot_travel_is_told(value: Any):
    with pytest.raises(DataError, match="cannot travel"):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8,
        LENGTH.pack(3) + b"abc",
        LENGTH.pack(1) + b"\xc1",
        encode({"a": 1})[:4] + b"\xff" * 4,
        encode({"__tensor__": "complex64", "shape": [1], "data": b"\0" * 8}),
        encode({"__tensor__": "float32", "shape": 1, "data": b"\0" * 8}),
        encode({"__tensor__": "float32", "shape": [3], "data": b"\0" * 8}),
        encode({"__tensor__": "float32", "shape": [1], "data": b"\0" * 3}),
        encode({"__tensor__": ["float32"], "shape": [1], "data": b"\0" * 4}),
    ],
)
def test_what_is_no_frame_of_ours_is_told(data: bytes):
    with pytest.raises(DataError, match="no frame of ours"):
        Frames().feed(data)


def test_over_a_socket():
    ours, theirs = socket.socketpair()
    sent = [{"picture": np.zeros((400, 400, 3), np.uint8)}, {"kind": "reply"}]
    came: list[Any] = []
    reader = threading.Thread(target=lambda: came.extend(values(theirs)))
    reader.start()
    with ours:
        for value in sent:
            ours.sendall(encode(value))
    reader.join(10)
    theirs.close()
    assert same(came, sent)
