"""Run one stage in a process of its own and tell Dagster by Pipes how it ended: `python -m assets.pipes_main`.

The step that started it has put into Pipes what to run. Imports no Dagster. Exit status as of `prts`: 0 done, 1 a
fault, 3 skipped, 75 stopped after a checkpoint, 130 interrupted.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes

from prts_core.config.load import load_plan
from prts_core.data.validation.report import Finding, ValidationFailed, ValidationReport
from prts_core.io.errors import PrtsError, Skipped, StageError, Stopped
from prts_core.launch.orders import from_plain, to_plain
from prts_core.launch.signals import stop_on_signals
from prts_core.launch.where import INLINE, parse_launch
from prts_core.stages import chain

STATUS: dict[type[PrtsError], int] = {Skipped: 3, Stopped: 75}
PR_SET_PDEATHSIG = 1


def pack(error: PrtsError) -> dict[str, Any]:
    """An error as plain data, a failed validation with its findings."""
    return to_plain(error) | ({"report": asdict(error.report)} if isinstance(error, ValidationFailed) else {})


def unpack(packed: dict[str, Any]) -> PrtsError:
    """The error that `pack` was given."""
    error = from_plain(packed)
    if (report := packed.get("report")) is None:
        return error
    failed = ValidationFailed(
        ValidationReport(report["dataset"], [Finding(**finding) for finding in report["findings"]]), "the report"
    )
    failed.set_cure(str(error.cure))
    return failed


class _ToDagster(logging.Handler):
    """Sends what the project logs to the run's page."""

    def __init__(self, pipes: PipesContext) -> None:
        super().__init__(logging.INFO)
        self.pipes = pipes

    def emit(self, record: logging.LogRecord) -> None:
        self.pipes.log.log(record.levelno, record.getMessage())


def main() -> int:
    stop_with_parent()
    with open_dagster_pipes() as pipes:
        asked = pipes.extras
        logging.getLogger("prts").addHandler(_ToDagster(pipes))
        try:
            with stop_on_signals():
                plan = load_plan(Path(asked["config"]), asked["overrides"])
                manifest = chain.run(
                    asked["stage"],
                    plan,
                    asked["partition"],
                    Path(asked["outputs"]),
                    caller=asked["caller"],
                    launch=INLINE if asked["launch"] == "process" else parse_launch(asked["launch"]),
                )
        except PrtsError as err:
            pipes.report_custom_message({"error": pack(err)})
            print(f"error: {err}", file=sys.stderr)
            return STATUS.get(type(err), 1)
        except KeyboardInterrupt as err:
            pipes.report_custom_message({"error": pack(Stopped(str(err) or "interrupted"))})
            return 130
        except Exception as err:
            pipes.report_custom_message({"error": pack(StageError(f"{type(err).__name__}: {err}"))})
            raise
        pipes.report_custom_message({"key": manifest.key})
    return 0


def stop_with_parent() -> None:
    """Have Linux stop this process by SIGTERM, hence after a checkpoint, when the one that started it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
