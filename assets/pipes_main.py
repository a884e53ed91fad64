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
from prts_core.errors import PrtsError, Skipped, StageError, Stopped
from prts_core.launch.signals import stop_on_signals
from prts_core.launch.where import INLINE, parse_launch
from prts_core.stages import chain

FIELDS = ("problem", "file", "field", "found", "expected", "cure")
STATUS: dict[type[PrtsError], int] = {Skipped: 3, Stopped: 75}
PR_SET_PDEATHSIG = 1


def pack(error: PrtsError) -> dict[str, Any]:
    """An error as plain data."""
    packed = {"kind": type(error).__name__} | {
        name: value if value is None else str(value) for name in FIELDS if (value := getattr(error, name)) is not None
    }
    return packed | ({"report": asdict(error.report)} if isinstance(error, ValidationFailed) else {})


def unpack(packed: dict[str, Any]) -> PrtsError:
    """The error that `pack` was given; of the family's other members, StageError stands for all."""
    report = packed.get("report")
    said = {name: packed[name] for name in FIELDS[1:] if name in packed}
    if report is not None:
        findings = [Finding(**finding) for finding in report["findings"]]
        error = ValidationFailed(ValidationReport(report["dataset"], findings), "the report")
        PrtsError.__init__(error, packed["problem"], **said)
        return error
    kind = {"Skipped": Skipped, "Stopped": Stopped}.get(packed["kind"], StageError)
    return kind(packed["problem"], **said)


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
                    asked["stage"], plan, asked["partition"], Path(asked["outputs"]), caller=asked["caller"],
                    launch=INLINE if asked["launch"] == "process" else parse_launch(asked["launch"]),
                )  # fmt: skip
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
