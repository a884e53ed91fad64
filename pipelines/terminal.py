"""Tell a terminal how a run goes: one line a stage when it is done, in colour where something is wrong."""

from __future__ import annotations

from typing import Any

import dagster as dg
from rich.console import Console
from rich.text import Text

from assets.launch import STOPPED
from prts_core.stages.declarations import STAGES

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}  # Dagster's own lines stay in its event log
FOUND_S = 5.0  # a stage whose work took longer than it was here for was finished before


class Lines:
    """Listens to one run's events. dataset: its partition. causes: what stopped it, in its own words."""

    def __init__(self, console: Console, dataset: str) -> None:
        self.console, self.dataset, self.causes = console, dataset, list[str]()
        self.begun: dict[str, float] = {}
        self.metadata: dict[str, Any] = {}
        self.skipped = ""

    def __call__(self, entry: dg.EventLogEntry) -> None:
        event = entry.dagster_event
        if event is None or event.step_key is None:
            return
        kind = event.event_type
        if kind == dg.DagsterEventType.STEP_START:
            self.begun[event.step_key], self.metadata, self.skipped = entry.timestamp, {}, ""
            if self.console.is_terminal:
                self.console.print(f"  {self._name(event)} ...", end="\r", highlight=False)
        elif kind == dg.DagsterEventType.ASSET_MATERIALIZATION:
            self.metadata = {name: value.value for name, value in event.materialization.metadata.items()}
        elif kind == dg.DagsterEventType.ASSET_OBSERVATION:
            value = event.asset_observation_data.asset_observation.metadata.get("skipped")
            self.skipped = str(value.value) if value is not None else ""
        elif kind == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            self._check(event.asset_check_evaluation_data)
        elif kind == dg.DagsterEventType.STEP_SUCCESS:
            self._done(event, entry.timestamp)
        elif kind == dg.DagsterEventType.ENGINE_EVENT and (event.message or "").startswith("Step blocked"):
            self._line("waits", f"{self._name(event)} another run uses all of its pool", "yellow")
        elif kind == dg.DagsterEventType.STEP_FAILURE:
            self._failed(event)

    def _done(self, event: dg.DagsterEvent, now: float) -> None:
        if self.skipped:
            return self._line("skipped", f"{self._name(event)} {self.skipped}", "yellow")
        took, work = now - self.begun[event.step_key or ""], float(self.metadata.get("seconds", 0.0))
        when = f"{took:8.1f} s" if work < took + FOUND_S else f"{took:8.1f} s  finished before, in {work:.0f} s"
        if uri := self.metadata.get("model_uri"):
            when += f"  {uri} {self.metadata['aliases']}"
        if not any(cause.startswith(f"{self._stage(event)} failed") for cause in self.causes):
            self._line("done", f"{self._name(event)}{when}", "green")

    def _failed(self, event: dg.DagsterEvent) -> None:
        data = event.step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            said = data.user_failure_data.description
        else:
            error = data.error and (data.error.cause or data.error)
            said = " ".join(error.message.split()) if error else "no step says why; `make ui` shows the run"
        self.causes.append(f"{self._stage(event)} failed: {said}")
        self._line(
            *("stopped", self._name(event), "yellow") if STOPPED in said else ("failed", self._name(event), "red")
        )

    def _check(self, check: Any) -> None:
        if check.passed:
            return
        stage = check.asset_key.path[-1]
        if check.blocking:
            self.causes.append(f"{stage} failed its check {check.check_name!r}: {check.description}")
        self._line("check", f"{stage}: {check.check_name}: {check.description}", "red" if check.blocking else "yellow")

    def _line(self, mark: str, text: str, colour: str) -> None:
        if self.console.is_terminal:
            self.console.file.write("\x1b[2K\r")
        self.console.print(Text.assemble((f"{mark:8}", colour), text))

    def _stage(self, event: dg.DagsterEvent) -> str:
        return str(event.step_key).partition("__")[2]

    def _name(self, event: dg.DagsterEvent) -> str:
        stage = self._stage(event)
        split = stage in STAGES and STAGES[stage].partitioned
        return f"{stage:10} {self.dataset if split else '':12}"
