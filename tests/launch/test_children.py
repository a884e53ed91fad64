"""Work that runs elsewhere: its result, points and faults come back; a stop reaches all ranks; nobody is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prts_core.io.errors import ConfigError, DataError, StageError
from prts_core.launch import children
from prts_core.launch.children import run_elsewhere
from prts_core.launch.signals import NOTICE, SAME_REQUEST_S
from prts_core.launch.where import INLINE, Launch, default_launch, parse_launch

ROOT = Path(__file__).resolve().parents[2]
CALLS = "tests.launch.launched_calls"
PROCESS, TWO = Launch("process"), Launch("torchrun", 2)
Points = list[tuple[int, dict[str, float]]]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # `python -m` finds the calls there


def call(launch: Launch, work: Path, function: str, points: Points | None = None, **arguments: object) -> dict:
    log = [] if points is None else points
    return run_elsewhere(launch, work, f"{CALLS}:{function}", arguments, lambda m, step: log.append((step, m)))


def test_a_result_and_its_points_come_back_from_another_process(tmp_path: Path) -> None:
    points: Points = []
    made = call(PROCESS, tmp_path, "add", points, a=2, b=3)
    assert made["sum"] == 5 and made["pid"] != os.getpid()
    assert made["session"] != os.getsid(0), "a terminal's Ctrl-C comes to the bookkeeper alone"
    assert points == [(0, {"loss": 0.5}), (1, {"loss": 0.25})]


def test_a_fault_comes_back_as_what_it_was_and_is_forgotten_by_the_next_launch(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        call(PROCESS, tmp_path, "refuse")
    assert str(caught.value) == ("Bad rows. File: x.parquet. Field: action. Found: 3. Expected: 7. Cure: mend it.")
    assert call(PROCESS, tmp_path, "add", a=1, b=1)["sum"] == 2


def test_a_process_that_dies_without_a_word_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"\(process\) ended by SIGKILL without a result"):
        call(PROCESS, tmp_path, "die")


def test_one_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    code = "import sys; from prts_core.launch import children; children.STOP_LIMIT_S = 0.5\n" + (
        f"from {CALLS} import main; sys.exit(main('torchrun:1', *sys.argv[1:]))"
    )
    with bookkeeper(tmp_path, "train", {"folder": str(tmp_path), "deaf": True}, code=code) as process:
        pids = wait_for_pids(tmp_path, process, 1)
        process.send_signal(signal.SIGTERM)
        _, faults = process.communicate(timeout=120)
    assert process.returncode == 75 and "without a checkpoint" in faults, faults
    gone(pids)


@pytest.mark.parametrize("text", ["inline", "process", "torchrun:4"])
def test_a_launch_is_written_as_it_is_read(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(parse_launch(text)) == text
    monkeypatch.setenv("PRTS_LAUNCH", text)
    assert default_launch() == parse_launch(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("torchru:2", "did you mean 'torchrun'"),
        ("torchrun", "write torchrun:2"),
        ("torchrun:0", "at least 1"),
        ("torchrun:x", "at least 1"),
        ("process:2", "torchrun:2"),
        ("", "inline, process, torchrun:N"),
    ],
)
def test_what_is_no_launch_is_refused(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_launch(text)
    monkeypatch.setenv("PRTS_LAUNCH", "")
    assert default_launch() == INLINE


# ---- a bookkeeper in a process of its own, so that it can be signalled and killed ------------------------------------
class bookkeeper:
    def __init__(
        self, folder: Path, function: str, arguments: dict, launch: str = "torchrun:2", code: str = ""
    ) -> None:
        work = folder / "work"
        work.mkdir()
        rest = [str(work), function, json.dumps(arguments)]
        self.command = [sys.executable, "-c", code, *rest] if code else [sys.executable, "-m", CALLS, launch, *rest]

    def __enter__(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        return self.process

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def wait_for_pids(folder: Path, process: subprocess.Popen[str], count: int) -> list[int]:
    while len(found := [p for p in folder.glob("pid-*") if p.read_text()]) < count:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.05)
    return [int(path.read_text()) for path in found]


def gone(pids: list[int], seconds: float = 60.0) -> None:
    """Fails where one of them is left behind. A loaded machine is given its time, which is none where all is well."""
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """A zombie that waits for the container's init to collect it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_stop_reaches_both_ranks_which_leave_at_one_step(tmp_path: Path) -> None:
    for number, status in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        folder = tmp_path / str(int(number))
        folder.mkdir()
        with bookkeeper(folder, "train", {"folder": str(folder)}) as process:
            pids = wait_for_pids(folder, process, 2)
            assert process.stdout is not None and process.stdout.readline() == "1\n", "points come while it trains"
            os.killpg(process.pid, number)  # as a terminal and Slurm do
            said, faults = process.communicate(timeout=120)
        assert process.returncode == status, faults
        left = [(folder / f"left-{rank}").read_text() for rank in (0, 1)]
        assert left[0] == left[1] and f"after step {left[0]}" in faults
        assert "Traceback" not in faults and "ChildFailed" not in faults, faults
        assert said.split()[-1] == left[0], "the last point has come back"
        gone(pids)


@pytest.mark.slow
def test_a_killed_bookkeeper_leaves_no_rank_behind(tmp_path: Path) -> None:
    with bookkeeper(tmp_path, "train", {"folder": str(tmp_path)}) as process:
        pids = wait_for_pids(tmp_path, process, 2)
        process.kill()
        process.wait()
        gone(pids)


@pytest.mark.slow
def test_a_second_signal_ends_everybody_at_once(tmp_path: Path) -> None:
    with bookkeeper(tmp_path, "train", {"folder": str(tmp_path), "deaf": True}) as process:
        pids = wait_for_pids(tmp_path, process, 2)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None and NOTICE.decode() in iter(process.stderr.readline, "")
        time.sleep(SAME_REQUEST_S + 0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
        gone(pids)


@pytest.mark.slow
def test_what_one_rank_meets_ends_both_and_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Only rank 1 met this"):
        call(TWO, tmp_path, "train", folder=str(tmp_path), alone_dies=True)
    gone([int(path.read_text()) for path in tmp_path.glob("pid-*")])


def test_work_without_grace_stops_at_once_elsewhere_too(tmp_path: Path) -> None:
    with bookkeeper(tmp_path, "hang", {"folder": str(tmp_path)}, "process") as process:
        pids = wait_for_pids(tmp_path, process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    gone(pids)
    assert children.STOP_LIMIT_S >= 60
