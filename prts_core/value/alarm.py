"""Tell while a robot acts whether it is still on course, by how its value runs against that of episodes that succeeded.

Conformal prediction over time: from the value curves of successful rollouts a band is made whose lower edge depends on
the control step, each curve counted from its first value: values have no common zero, and one constant an
instruction. An episode's score is how far, at worst, it has been below the band's middle in units of the band's
width, and the alarm's threshold is a quantile of such scores over other successful rollouts. Where later episodes that
succeed are like those, at most `rate` of them ever raise an alarm, whatever the values' distribution (Vovk et al.
2005; functional conformal bands, Diquigiovanni et al. 2022). Of failures nothing is promised; how many are caught is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prts_core.io.errors import DataError
from prts_core.io.files import read_json

FILE = "alarm.json"  # beside a policy that has one
State = Literal["on_course", "unsure", "failing"]
RATES = (0.05, 0.2)  # of successful episodes that are ever called failing; unsure
NARROWEST = 1e-3  # nats: a band where all values were alike


@dataclass(frozen=True)
class Alarm:
    """middle, width (T,): of the value at each control step, less the first. failing, unsure: thresholds of the score.
    rates: the false alarms that they stand for. episodes: that they were made of. every: control steps between two
    looks of those; looking more often would find a worse one more often."""

    middle: tuple[float, ...]
    width: tuple[float, ...]
    failing: float
    unsure: float
    rates: tuple[float, float] = RATES
    episodes: int = 0
    every: int = 1

    def score(self, steps: np.ndarray, values: np.ndarray) -> float:
        """How far below the middle an episode has been at worst. steps, values (N,): of its looks so far, the first one
        included, `every` steps apart or more."""
        if not len(values):
            return -math.inf
        at = np.clip(np.asarray(steps, np.int64), 0, len(self.middle) - 1)
        risen = np.asarray(values, np.float64) - values[0]
        return float(((np.asarray(self.middle)[at] - risen) / np.asarray(self.width)[at]).max())

    def state(self, score: float) -> State:
        if score > self.failing:
            return "failing"
        return "unsure" if score > self.unsure else "on_course"

    def to_json(self) -> dict[str, Any]:
        return {
            "middle": list(self.middle),
            "width": list(self.width),
            "failing": self.failing,
            "unsure": self.unsure,
            "rates": list(self.rates),
            "episodes": self.episodes,
            "every": self.every,
        }

    @staticmethod
    def from_json(raw: Mapping[str, Any], where: object = None) -> Alarm:
        try:
            made = Alarm(
                tuple(map(float, raw["middle"])),
                tuple(map(float, raw["width"])),
                float(raw["failing"]),
                float(raw["unsure"]),
                (float(raw["rates"][0]), float(raw["rates"][1])),
                int(raw["episodes"]),
                int(raw["every"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as err:
            raise DataError("An alarm's record is malformed", file=where, found=f"{type(err).__name__}: {err}") from err
        if len(made.middle) != len(made.width) or not made.middle or min(made.width) <= 0:
            raise DataError(
                "An alarm's band is none", file=where, found=f"{len(made.middle)} and {len(made.width)} steps"
            )
        return made


def read_alarm(folder: Path) -> Alarm | None:
    """The alarm of a package or of stage value's result; none where it has none. DataError where it is malformed."""
    path = folder / FILE
    return Alarm.from_json(read_json(path), path) if path.is_file() else None


class Watch:
    """An alarm over one episode that is under way."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm
        self.worst = -math.inf
        self.first: float | None = None
        self.looked = 0

    def saw(self, step: int, value: float) -> State:
        """The state after a look at `step` whose value is `value` nats. What is no number is failing."""
        if not math.isfinite(value):
            self.worst = math.inf
        elif self.first is None:
            self.first, self.looked = value, step
        elif step - self.looked >= self.alarm.every:
            self.looked = step
            self.worst = max(self.worst, self.alarm.score(np.array([0, step]), np.array([self.first, value])))
        return self.alarm.state(self.worst)


def calibrate(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], rates: tuple[float, float] = RATES, seed: int = 0
) -> Alarm:
    """curves: (steps (N,), values (N,)) of successful episodes, which are split at random: one half makes the band, the
    other the thresholds. DataError where there are too few for the rates."""
    needed = 2 * math.ceil(1 / min(rates))
    if len(curves) < needed:
        raise DataError(
            "There are too few successful episodes to calibrate an alarm",
            found=len(curves),
            expected=f"{needed} or more, for a false-alarm rate of {min(rates):g}",
            cure="benchmark more episodes with their values, or ask for a higher rate",
        )
    every = int(np.median(np.concatenate([np.diff(steps) for steps, _ in curves if len(steps) > 1] or [np.ones(1)])))
    order = np.random.default_rng(seed).permutation(len(curves))
    half = len(curves) // 2
    band = Alarm(*_band([curves[i] for i in order[:half]]), 0.0, 0.0)
    scores = np.sort([band.score(*curves[i]) for i in order[half:]])
    failing, unsure = (_quantile(scores, rate) for rate in rates)
    return Alarm(band.middle, band.width, failing, unsure, rates, len(curves), max(1, every))


def _band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the value at every control step, between looks on a straight line. Beyond an episode's end
    its last value stands: it has succeeded, and stays so."""
    length = max(int(steps.max()) for steps, _ in curves) + 1
    grid = np.arange(length)
    laid = np.stack([np.interp(grid, steps, np.asarray(values) - values[0]) for steps, values in curves])
    return tuple(laid.mean(0).tolist()), tuple(np.maximum(laid.std(0), NARROWEST).tolist())


def _quantile(scores: np.ndarray, rate: float) -> float:
    """The least threshold that, of one more score of the same kind, is exceeded with a chance of at most `rate`."""
    place = math.ceil((1.0 - rate) * (len(scores) + 1)) - 1
    return math.inf if place >= len(scores) else float(scores[place])
