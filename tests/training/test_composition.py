"""Every process reaches every module and term, whatever its part of a batch holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("composition_driver.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_random_batches_of_every_composition_on_two_processes() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(DRIVER), "500"],
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
