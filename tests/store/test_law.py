"""Whatever is run, killed, changed, collected or checked out meanwhile: no wrong lineage, no lost checkpoint, no reader
disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("law_driver.py")
ROUNDS = 200
SEED = 13


def test_two_hundred_random_interleavings_hold_the_law(memory: Path):
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(memory), str(SEED), str(ROUNDS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout)
    counts = said["counts"]
    assert said["violation"] is None, said["violation"]
    print(counts)
    # The interleavings were such: kills that hit, work resumed from checkpoints, results collected, views checked out.
    for what, least in (("killed", 50), ("resumed", 5), ("collected", 20), ("checkout", 10), ("source", 20)):
        assert counts[what] >= least, (what, counts)
