"""A run that is killed again and again, learner and simulators, ends in the weights and the curve of one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.tensors import load_tensors
from tests.fixtures.tiny_policy import write_policy
from tests.rl.test_run import FLOW, TOY

KILLS = 12
ROOT = Path(__file__).parents[2]


def begin(policy: Path, work: Path, weights: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.fixtures.toy_rl", *map(str, (policy, work, weights))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(one) for one in found.read_text().split()]
    except OSError:
        return []


def curve(work: Path) -> dict[int, dict[str, float]]:
    rows = {}
    for line in (work / "curve.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["iteration"]] = {k: v for k, v in row.items() if not k.startswith("time/") and k != "env/lost_workers"}
    return rows


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_kills_end_in_the_same_curve(tmp_path: Path):
    policy = write_policy(tmp_path / "p" / "policy", FLOW, TOY)
    calm = begin(policy, tmp_path / "calm", tmp_path / "calm.safetensors")
    started = time.monotonic()
    assert calm.wait(300) == 0, calm.stderr and calm.stderr.read().decode()[-2000:]
    whole = time.monotonic() - started
    rng = np.random.default_rng(3)
    kills, target = 0, tmp_path / "killed.safetensors"
    while not target.exists():
        run = begin(policy, tmp_path / "killed", target)
        wait = rng.uniform(0.4, 0.9) * whole if kills < KILLS else 300.0
        until = time.monotonic() + wait
        while kills < KILLS and time.monotonic() < until and run.poll() is None:
            time.sleep(rng.uniform(0.02, 0.1) * whole)
            workers = children(run.pid)
            if workers and rng.random() < 0.7:
                os.kill(int(rng.choice(workers)), signal.SIGKILL)  # a simulator
                kills += 1
        if kills < KILLS and run.poll() is None:
            run.kill()  # the learner
            kills += 1
        run.wait(300)
    assert kills >= KILLS // 3  # on a busy machine the run is over sooner, as kills go
    one, other = load_tensors(tmp_path / "calm.safetensors")[0], load_tensors(target)[0]
    assert all(np.array_equal(one[name].numpy(), other[name].numpy()) for name in one)
    assert curve(tmp_path / "calm") == curve(tmp_path / "killed")
