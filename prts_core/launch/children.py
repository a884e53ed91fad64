"""Run a call in processes that are started here, and wait for it: one process, or torchrun's.

The caller keeps the books and takes part in no collective. A stop signal to it reaches every rank; they leave a
checkpoint and end, or are killed after STOP_LIMIT_S. Killing the caller, SIGKILL too, ends them all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prts_core.io.errors import StageError, Stopped
from prts_core.io.files import read_json, write_json
from prts_core.io.processes import how_it_ended
from prts_core.launch.orders import ORDER, RESULT, STOP, Log, Points, clear, read_fault
from prts_core.launch.signals import graceful
from prts_core.launch.where import Launch

STOP_LIMIT_S = 600.0  # for the steps to the next look and one checkpoint
POLL_S = 0.2


def run_elsewhere(launch: Launch, work: Path, call: str, arguments: dict[str, Any], log: Log) -> Any:
    """Call `module:function`(**arguments, log=...) over `launch.processes` processes; return rank 0's plain result.

    arguments: plain JSON. work: an existing folder, for the files of `orders.py`. log: called here with what rank 0
    logs. Raises the error that a rank has met; StageError where one ended without a word.
    """
    clear(work)
    write_json(work / ORDER, {"call": call, "arguments": arguments})
    points = Points(work)
    with graceful() as stop, _started(launch, work) as child:
        asked = 0.0
        while child.poll() is None:
            points.pass_on(log)
            if stop() and not asked:
                asked = time.monotonic()
                (work / STOP).touch()
            if asked and time.monotonic() - asked > STOP_LIMIT_S:
                raise Stopped(
                    f"Stopped on request, without a checkpoint: none was written within {STOP_LIMIT_S:.0f} s",
                    file=work,
                    cure="the same command goes on from the last checkpoint",
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
        points.pass_on(log)
        if (work / RESULT).exists():
            return read_json(work / RESULT)
        fault = read_fault(work)
        if fault is not None:
            raise fault
        raise StageError(
            f"The stage's processes ({launch}) {how_it_ended(child.returncode)} without a result",
            file=work,
            cure="look at what they printed above; the same command goes on from the last checkpoint",
        )


@contextlib.contextmanager
def _started(launch: Launch, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launched process, in a session of its own: signals of a terminal come to the caller alone."""
    rank = ["-m", "prts_core.launch.rank", str(work)]
    many = ["-m", "prts_core.launch.agent", "--standalone", "--nproc-per-node", str(launch.processes)]
    environment = {"OMP_NUM_THREADS": "1"} if launch.kind == "torchrun" else {}
    child = subprocess.Popen(
        [sys.executable, *(many if launch.kind == "torchrun" else []), *rank],
        env=environment | os.environ,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # its ranks end with it
        child.wait()
