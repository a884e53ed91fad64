"""Collect in the process that learns: what a run without rollout processes has in place of a fleet (rl/fleet.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prts_core.rl.weights import WeightDiff
from prts_core.rl.workers import Collector, Lost, Report


@dataclass
class InProcess:
    """A fleet of none. The collector acts by the learner's own model, so that nothing is passed on."""

    collector: Collector
    version: int = 0
    lost: list[Lost] = field(default_factory=list)
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.report = Report(self.version)

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def publish(self) -> WeightDiff:
        """Count the version; there is nothing to pass on."""
        self.version += 1
        self.report = Report(self.version)
        return WeightDiff(self.version - 1, self.version, {})

    def collect(self, orders: Sequence[Any], batch: int) -> list[Any]:
        """A record for every order, in their order."""
        return [
            record
            for at in range(0, len(orders), batch)
            for record in self.collector.collect(list(orders[at : at + batch]))
        ]

    def check(self) -> None:
        """Nothing can differ."""

    def close(self) -> None:
        """There is nobody to end; the collector is its maker's."""
