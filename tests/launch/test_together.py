"""Processes of somebody else's launcher: they wait without a limit, work together, and go home when nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prts_core.io.errors import ConfigError
from prts_core.launch.together import refuse_many
from tests.launch.test_children import gone

DRIVER = Path(__file__).with_name("together_driver.py")


def start(folder: Path, case: str) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(DRIVER), str(folder), case]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "status", "said"), [("works", 0, "made"), ("finished", 0, "found"), ("fault", 1, "")])
def test_the_others_wait_for_the_first_longer_than_a_collective_would(
    tmp_path: Path, case: str, status: int, said: str
) -> None:
    with start(tmp_path, case) as process:
        out, faults = process.communicate(timeout=120)
    assert process.returncode == status, faults
    assert out.strip() == said
    assert len(list(tmp_path.glob("worked-*"))) == (2 if case == "works" else 0)
    assert faults.count("error: Only the first process sees this") == (case == "fault")
    assert "DistStoreError" not in faults and "DistNetworkError" not in faults


@pytest.mark.slow
def test_a_fault_that_one_of_the_others_alone_meets_is_told_by_it(tmp_path: Path) -> None:
    """A picture that is damaged lies in one process's rows."""
    with start(tmp_path, "own fault") as process:
        _, faults = process.communicate(timeout=120)
    assert process.returncode == 1
    assert faults.count("process 1: Only the second process sees this. Cure: mend its row") == 1, faults


@pytest.mark.slow
@pytest.mark.parametrize(("case", "status"), [("works", 0), ("finished", 0), ("fault", 1)])
def test_without_torchrun_the_first_process_keeps_the_store(tmp_path: Path, case: str, status: int) -> None:
    """As under srun or deepspeed: the store ends with the first process, which therefore leaves last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(DRIVER), str(tmp_path), case]
    ranks = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    faults = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status, 0], faults
    assert len(list(tmp_path.glob("worked-*"))) == (2 if case == "works" else 0)


@pytest.mark.slow
def test_a_stop_reaches_a_process_that_waits(tmp_path: Path) -> None:
    """A wait inside the store would hear no signal, and torchrun would kill after 30 s."""
    with start(tmp_path, "waits") as process:
        while len(found := [p for p in tmp_path.glob("pid-*") if p.read_text()]) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        pids = [int(path.read_text()) for path in found]
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        _, faults = process.communicate(timeout=120)
    assert faults.count("error: Stopped by SIGTERM") == 2, faults  # torchrun kills after 30 s those that say nothing
    gone(pids)


def test_a_stage_that_does_not_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_many("stats", trains=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_many("sft", trains=True)
    with pytest.raises(ConfigError, match=r"'stats' runs in one process.*prts stats"):
        refuse_many("stats", trains=False)
