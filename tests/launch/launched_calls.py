"""What test_children.py has done elsewhere; as a command, a bookkeeper that does it: LAUNCH WORK FUNCTION [JSON]."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prts_core.io.errors import DataError, PrtsError, Stopped
from prts_core.launch.children import run_elsewhere
from prts_core.launch.orders import Log
from prts_core.launch.signals import graceful, stop_on_signals
from prts_core.launch.together import Followed
from prts_core.launch.where import parse_launch


def add(log: Log, a: int, b: int) -> dict[str, Any]:
    log({"loss": 0.5}, 0)
    log({"loss": 0.25}, 1)
    return {"sum": a + b, "pid": os.getpid(), "session": os.getsid(0)}


def refuse(log: Log) -> None:
    raise DataError("Bad rows", file="x.parquet", field="action", found=3, expected="7", cure="mend it")


def die(log: Log) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(log: Log, folder: str) -> None:
    (Path(folder) / f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.1)


def train(log: Log, folder: str, deaf: bool = False, alone_dies: bool = False) -> dict[str, int]:
    """Minutes of steps over two gloo processes, which agree on stopping; each writes the step it left at."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, step = dist.get_rank(), 0
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    if alone_dies and rank:
        raise DataError("Only rank 1 met this", cure="mend it")
    with graceful() as stop:
        while step < 3000:
            step += 1
            flag = torch.tensor([int(stop() and not deaf)])
            dist.all_reduce(flag)
            log({"loss": 1.0 / step}, step)
            if int(flag):
                (Path(folder) / f"left-{rank}").write_text(str(step))
                raise Stopped(f"Stopped on request after step {step}", file=folder, cure="the same command goes on")
            time.sleep(0.1)
    if rank:
        raise Followed
    return {"steps": step}


def main(launch: str, work: str, function: str, arguments: str = "{}") -> int:
    """The exit statuses of `prts`; what is logged goes to standard output."""
    try:
        with stop_on_signals():
            made = run_elsewhere(
                parse_launch(launch),
                Path(work),
                f"tests.launch.launched_calls:{function}",
                json.loads(arguments),
                lambda metrics, step: print(step, flush=True),
            )
            print(json.dumps(made))
    except PrtsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 75 if isinstance(err, Stopped) else 1
    except KeyboardInterrupt as err:
        print(err, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
