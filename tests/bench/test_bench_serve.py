"""The server's benchmark at toy size: it runs, withstands what it is given, and its rows hold what they say."""

from __future__ import annotations

import os
import random

import pytest
from rich.console import Console

from prts_core.bench import serve
from prts_core.bench.serve_harm import broken, malformed_of
from prts_core.bench.serve_parts import request, served
from prts_core.bench.serve_process import CONTRACT
from prts_core.io.errors import PrtsError, UnavailableError
from prts_core.io.msgpack import LIMITS, pack, unpack
from prts_core.serving.observations import parse_request


def test_a_server_that_ended_is_told():
    with pytest.raises(UnavailableError, match="has ended"), served() as server:
        os.kill(server.pid, 9)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def test_broken_frames_are_broken():
    draw, frame = random.Random(0), bytes(range(200))
    assert sum(broken(frame, draw) == frame for _ in range(500)) < 5


def test_a_malformed_frame_is_none_that_the_policy_is_asked_for():
    """Changed pixels are a request like any other, and cost what it costs."""
    draw, good = random.Random(0), pack(request(CONTRACT))

    def asked(frame: bytes) -> bool:
        try:
            parse_request(unpack(frame, LIMITS), CONTRACT)
        except PrtsError:
            return False
        return True

    assert any(asked(broken(good, draw)) for _ in range(200))

    def acted(frame: bytes) -> None:
        parse_request(unpack(frame, LIMITS), CONTRACT)

    assert not any(asked(malformed_of(good, draw, acted)) for _ in range(200))


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size():
    rows = {row.what: row for row in serve.run(Console(quiet=True), quick=True, soak_s=3.0)}
    assert len(rows) == 11
    assert all(row.ours >= 0 and row.note for what, row in rows.items() if "added" not in what)
    # What does not depend on the machine's pace:
    for what in ("hot swap: requests that failed / all", "soak: open files after / before"):
        assert rows[what].met, rows[what].line()
