"""A call over processes that torchrun started: called by test_together.py with FOLDER CASE."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prts_core.io.errors import DataError, PrtsError, Stopped
from prts_core.launch.signals import stop_on_signals
from prts_core.launch.together import Followed, run_together

LIMIT_S = 8.0


def shared_work(folder: Path) -> None:
    """A collective with a limit of LIMIT_S: what the others would not survive if they had waited in one."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    dist.barrier()
    (folder / f"worked-{dist.get_rank()}").touch()


def main(folder: Path, case: str) -> int:
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))

    def first(call) -> str:
        time.sleep(LIMIT_S + 2)  # hashing a terabyte
        if case == "finished":
            return "found"
        if case == "fault":
            raise DataError("Only the first process sees this", cure="mend it")
        if case == "waits":
            time.sleep(300)
        call(json.dumps({"folder": str(folder), "case": case}))
        shared_work(folder)
        return "made"

    def follow(order: str) -> None:
        if json.loads(order)["case"] == "own fault":
            raise DataError("Only the second process sees this", cure="mend its row")
        shared_work(Path(json.loads(order)["folder"]))
        raise Followed

    try:
        with stop_on_signals():
            print(run_together(first, follow), flush=True)
    except PrtsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 75 if isinstance(err, Stopped) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
