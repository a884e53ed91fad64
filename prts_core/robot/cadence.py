"""Tell how a robot's control loop kept its time: planned and actual period, late steps, steps without an action."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Cadence:
    """Counts of one run. Times are seconds.

    planned_s: the control period. late: steps that began more than half a period after they were due, counted from the
    step before. starved: steps for which no chunk had a row. looks: chunks that arrived. discarded: chunks that were
    not executed, because the connection had been lost while they were asked for. unbridged: looks that asked for no
    continuation, because the chunk is too short for the delay. overrun: looks that took longer than the delay told, so
    that the robot may have jumped where their chunk began. longest_delay: control steps that a look took at most.
    """

    planned_s: float
    steps: int = 0
    late: int = 0
    starved: int = 0
    looks: int = 0
    discarded: int = 0
    unbridged: int = 0
    overrun: int = 0
    longest_s: float = 0.0
    _sum_s: float = 0.0
    _intervals: int = 0
    _before: float | None = None
    _delay_sum: int = 0
    longest_delay: int = 0

    def begins(self, now: float) -> None:
        """A control step begins; `now` is of a monotonic clock."""
        self.steps += 1
        if self._before is not None:
            interval = now - self._before
            self._sum_s += interval
            self._intervals += 1
            self.longest_s = max(self.longest_s, interval)
            self.late += interval > 1.5 * self.planned_s
        self._before = now

    def pauses(self) -> None:
        """The loop stands still on purpose, as between two tasks: the gap is no step."""
        self._before = None

    def arrived(self, delay: int, told: int | None = None) -> None:
        """A chunk is here, `delay` control steps after it was asked for; the server was told to expect `told`."""
        self.looks += 1
        self.overrun += told is not None and delay > told
        self._delay_sum += delay
        self.longest_delay = max(self.longest_delay, delay)

    @property
    def mean_s(self) -> float:
        """The actual period; not a number before the second step."""
        return self._sum_s / self._intervals if self._intervals else math.nan

    @property
    def mean_delay(self) -> float:
        return self._delay_sum / self.looks if self.looks else math.nan

    def to_json(self) -> dict[str, Any]:
        counts = {name: value for name, value in asdict(self).items() if name[0] != "_"}
        means = {"mean_s": self.mean_s, "mean_delay": self.mean_delay}
        return counts | {name: None if math.isnan(value) else value for name, value in means.items()}

    def __str__(self) -> str:
        told = [
            f"{self.steps} steps, a step every {self.mean_s * 1e3:.1f} ms (planned {self.planned_s * 1e3:.1f}, "
            f"longest {self.longest_s * 1e3:.1f})",
            f"{self.late} late",
            f"{self.starved} starved",
            f"{self.looks} looks that took {self.mean_delay:.1f} steps (longest {self.longest_delay})",
        ]
        told += [f"{self.discarded} chunks discarded after a lost connection"] * bool(self.discarded)
        told += [f"{self.overrun} looks longer than told"] * bool(self.overrun)
        told += [f"{self.unbridged} looks too slow for real-time chunking"] * bool(self.unbridged)
        return "; ".join(told)
