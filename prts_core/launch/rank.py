"""Do the work that a bookkeeper has written down in a folder: `python -m prts_core.launch.rank WORK`.

Exit status: 0 done, or stopped as all ranks agreed; 1 a fault that is written down; 75 stopped alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from prts_core.io.errors import PrtsError, Stopped
from prts_core.io.files import read_json, write_json
from prts_core.launch.orders import ORDER, RESULT, STOP, write_fault, writer
from prts_core.launch.orphans import end_with_parent
from prts_core.launch.signals import stop_on_signals, stop_when
from prts_core.launch.together import Followed, leave


def main(work: Path) -> int:
    rank = int(os.environ.get("RANK", "0"))
    try:
        with stop_on_signals():
            stop_when(work / STOP)
            try:
                result = perform(work, rank)
            except Followed:
                result = None
            except Stopped as err:  # by the training loop, the same in every rank
                write_fault(work, rank, err)
                return 0
            if rank == 0:
                write_json(work / RESULT, result)
            leave()
    except PrtsError as err:
        write_fault(work, rank, err)
        return 75 if isinstance(err, Stopped) else 1
    return 0


def perform(work: Path, rank: int) -> Any:
    """Call the function that the order names."""
    order = read_json(work / ORDER)
    module, _, name = order["call"].partition(":")
    function = getattr(importlib.import_module(module), name)
    return function(**order["arguments"], log=writer(work) if rank == 0 else lambda metrics, step: None)


if __name__ == "__main__":
    end_with_parent()
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's own threads may abort a process that ends while they still run
