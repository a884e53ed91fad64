"""Recording of experts, killed and stopped: no worker goes on alone, and the result does not show it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.config.schema import CollectConfig
from prts_core.config.sources import ExpertSource
from prts_core.stages.collect import collect
from prts_core.store.listing import digest_tree
from prts_core.store.stage import StageContext
from tests.launch.test_children import gone

# Noise at which some attempts fail: their number is part of the result.
SOURCE = ExpertSource(
    "expert",
    "tests.fixtures.toy_family:toy",
    ("push", "drawn"),
    noise=(0.0, 2.0),
    train_episodes=100,
    heldout_episodes=2,
)
CODE = """\
import sys
from dataclasses import replace
from pathlib import Path
from prts_core.launch.signals import stop_on_signals
from tests.stages.test_collect_killed import SOURCE, CollectConfig, collect, context
if __name__ == "__main__":
    with stop_on_signals():
        collect(CollectConfig("toy", replace(SOURCE, train_episodes=int(sys.argv[2]))), {}, context(Path(sys.argv[1])))
"""


def context(folder: Path) -> StageContext:
    made = StageContext(folder, folder / "work", 7, "toy", "toy")
    made.output.mkdir(parents=True, exist_ok=True)
    return made


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start(folder: Path, episodes: int = SOURCE.train_episodes) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A recording that is under way, and its workers."""
    (folder / "record.py").write_text(CODE)
    journal = folder / "work" / "recorded" / "train" / "attempts.jsonl"
    before = lines(journal)
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(folder / "record.py"), str(folder), str(episodes)],
            stderr=said,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
    deadline = time.monotonic() + 120
    while lines(journal) < before + 3:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "said").read_text()
        time.sleep(0.01)
    return process, [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_kill_leaves_no_worker_and_no_trace_in_the_result(tmp_path: Path) -> None:
    plain, killed = context(tmp_path / "plain"), context(tmp_path / "killed")
    straight = collect(CollectConfig("toy", replace(SOURCE, workers=1)), {}, plain)
    for _ in range(2):
        process, workers = start(tmp_path / "killed")
        assert len(workers) >= 2
        process.kill()
        process.wait()
        gone(workers, 10.0)
    resumed = collect(CollectConfig("toy", SOURCE), {}, killed)
    assert digest_tree(killed.output) == digest_tree(plain.output)
    assert resumed.metrics == straight.metrics and straight.metrics["dropped_attempts"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_the_workers_at_once(tmp_path: Path, number: int) -> None:
    process, workers = start(tmp_path, 20_000)
    process.send_signal(number)
    process.wait(60)  # so many episodes take minutes
    said = (tmp_path / "said").read_text()
    assert ("Stopped by SIGTERM" if number == signal.SIGTERM else "KeyboardInterrupt: interrupted") in said
    gone(workers, 10.0)
