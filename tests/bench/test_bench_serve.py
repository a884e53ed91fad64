"""The server's benchmark at toy size: it runs, withstands what it is given, and its rows hold what they say."""

from __future__ import annotations

import os
import random

import pytest
from rich.console import Console

from prts_core.bench import serve
from prts_core.bench.serve_harm import broken
from prts_core.bench.serve_parts import served
from prts_core.io.errors import UnavailableError


def test_a_server_that_ended_is_told():
    with pytest.raises(UnavailableError, match="has ended"), served() as server:
        os.kill(server.pid, 9)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def test_broken_frames_are_broken():
    draw, frame = random.Random(0), bytes(range(200))
    assert sum(broken(frame, draw) == frame for _ in range(500)) < 5


@pytest.mark.slow
def test_the_whole_benchmark_at_toy_size():
    rows = {row.what: row for row in serve.run(Console(quiet=True), quick=True, soak_s=3.0)}
    assert len(rows) == 11
    assert all(row.ours >= 0 and row.note for what, row in rows.items() if "added" not in what)
    # What does not depend on the machine's pace:
    for what in ("hot swap: requests that failed / all", "soak: open files after / before"):
        assert rows[what].met, rows[what].line()
