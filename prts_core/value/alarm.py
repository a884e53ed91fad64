"""Tell while a robot acts whether it is still on course: by how its value runs, and by how long it takes, against
episodes that succeeded.

Conformal prediction over time. Half of the successful rollouts say how each sentence's episodes go: the course of the
value by control step, counted from each curve's first value (values have no common zero, and one constant a sentence),
and how many steps it takes. An episode's two scores are how far its value has sunk below that course, in units of its
spread and over three looks, and how long it has taken, in units of the usual time. Thresholds are quantiles of such
scores over the other half. Where later episodes that succeed are like those, at most `rate` of them ever raise an
alarm, whatever the values' distribution (Vovk et al. 2005; functional conformal bands, Diquigiovanni et al. 2022). A
fifth of the rate is the value's; the rest is the time's, which tells almost every failure, but late. Of failures
nothing is promised; how many are caught, and when, is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prts_core.io.errors import DataError
from prts_core.io.files import read_json
from prts_core.text.prompt import clean_instruction

FILE = "alarm.json"  # beside a policy that has one
State = Literal["on_course", "unsure", "failing"]
RATES = (0.05, 0.2)  # of successful episodes that are ever called failing; unsure
VALUES_PART = 0.2  # of a rate
LOOKS = 3  # that a value is judged over
FEWEST = 4  # episodes that make a sentence's own course
ANY = ""  # the course of a sentence that has none of its own
NARROWEST = 1e-3  # nats: a band where all values were alike


@dataclass(frozen=True)
class Rollout:
    """steps, values (N,): of the looks of one episode, its first one included."""

    instruction: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Course:
    """How a sentence's episodes succeed. middle, width (T,): of the value at each control step, less the first. steps:
    until the last look, the median."""

    middle: tuple[float, ...]
    width: tuple[float, ...]
    steps: float

    def sunk(self, step: int, risen: float) -> float:
        """How far below the middle a value lies. Beyond the longest episode the end of the course stands."""
        at = min(step, len(self.middle) - 1)
        return (self.middle[at] - risen) / self.width[at]


@dataclass(frozen=True)
class Scores:
    """At worst, so far: how far the value had sunk (`Course.sunk`, the mean of three looks), and the share of the usual
    time that the episode has taken."""

    sunk: float = -math.inf
    late: float = 0.0

    def above(self, other: Scores) -> bool:
        return self.sunk > other.sunk or self.late > other.late


@dataclass(frozen=True)
class Alarm:
    """courses: by sentence, as policies read it (`clean_instruction`), and of any sentence under "". failing, unsure:
    thresholds. rates: the false alarms that they stand for. episodes: that it was made of. every: control steps between
    two looks of those; looking more often would find a worse one more often."""

    courses: Mapping[str, Course]
    failing: Scores
    unsure: Scores
    rates: tuple[float, float] = RATES
    episodes: int = 0
    every: int = 1

    def course(self, instruction: str) -> Course:
        return self.courses.get(clean_instruction(instruction), self.courses[ANY])

    def state(self, scores: Scores) -> State:
        if scores.above(self.failing) or scores.sunk == math.inf:  # a value was no number
            return "failing"
        return "unsure" if scores.above(self.unsure) else "on_course"

    def scores(self, rollout: Rollout) -> Scores:
        watch = Watch(self, rollout.instruction)
        for step, value in zip(rollout.steps.tolist(), rollout.values.tolist(), strict=True):
            watch.saw(step, value)
        return watch.worst

    def to_json(self) -> dict[str, Any]:
        """Plain values; a threshold that no episode reaches is null."""
        limits = {
            name: {key: own if math.isfinite(own) else None for key, own in asdict(scores).items()}
            for name, scores in (("failing", self.failing), ("unsure", self.unsure))
        }
        courses = {said: asdict(course) for said, course in self.courses.items()}
        plain = {"courses": courses, "rates": list(self.rates), "episodes": self.episodes, "every": self.every}
        return plain | limits

    @staticmethod
    def from_json(raw: Mapping[str, Any], where: object = None) -> Alarm:
        try:
            courses = {
                str(said): Course(
                    tuple(map(float, own["middle"])), tuple(map(float, own["width"])), float(own["steps"])
                )
                for said, own in raw["courses"].items()
            }
            failing, unsure = (
                Scores(*(math.inf if raw[name][key] is None else float(raw[name][key]) for key in ("sunk", "late")))
                for name in ("failing", "unsure")
            )
            rates = (float(raw["rates"][0]), float(raw["rates"][1]))
            made = Alarm(courses, failing, unsure, rates, int(raw["episodes"]), int(raw["every"]))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as err:
            raise DataError("An alarm's record is malformed", file=where, found=f"{type(err).__name__}: {err}") from err
        wrong = [
            said or "any sentence"
            for said, own in courses.items()
            if len(own.middle) != len(own.width) or not own.middle or min(own.width) <= 0 or own.steps <= 0
        ]
        if wrong or ANY not in courses:
            raise DataError(
                "An alarm's course is none", file=where, found=", ".join(wrong) or "no course of any sentence"
            )
        return made


def read_alarm(folder: Path) -> Alarm | None:
    """The alarm of a package or of stage value's result; none where it has none. DataError where it is malformed."""
    path = folder / FILE
    return Alarm.from_json(read_json(path), path) if path.is_file() else None


class Watch:
    """An alarm over one episode that is under way."""

    def __init__(self, alarm: Alarm, instruction: str) -> None:
        self.alarm, self.course = alarm, alarm.course(instruction)
        self.worst = Scores()
        self.first: float | None = None
        self.looked = 0
        self.recent: list[float] = []

    def saw(self, step: int, value: float) -> State:
        """The state after a look at `step` of the episode whose value is `value` nats. What is no number is failing."""
        late = max(self.worst.late, step / self.course.steps)
        if not math.isfinite(value):
            self.worst = Scores(math.inf, late)
            return "failing"
        if self.first is None:
            self.first = value
        elif step - self.looked < self.alarm.every:
            self.worst = Scores(self.worst.sunk, late)
            return self.alarm.state(self.worst)
        self.looked = step
        self.recent = [*self.recent, self.course.sunk(step, value - self.first)][-LOOKS:]
        sunk = sum(self.recent) / LOOKS if len(self.recent) == LOOKS else -math.inf
        self.worst = Scores(max(self.worst.sunk, sunk), late)
        return self.alarm.state(self.worst)


def calibrate(rollouts: Sequence[Rollout], rates: tuple[float, float] = RATES, seed: int = 0) -> Alarm:
    """Of successful episodes, split at random: one half makes the courses, the other the thresholds. DataError where
    there are too few for the rates."""
    needed = 2 * math.ceil(1 / (min(rates) * (1 - VALUES_PART)))
    if len(rollouts) < needed:
        raise DataError(
            "There are too few successful episodes to calibrate an alarm",
            found=len(rollouts),
            expected=f"{needed} or more, for a false-alarm rate of {min(rates):g}",
            cure="benchmark more episodes with their values, or ask for a higher rate",
        )
    apart = np.concatenate([np.diff(one.steps) for one in rollouts if len(one.steps) > 1] or [np.ones(1)])
    order = np.random.default_rng(seed).permutation(len(rollouts))
    half = len(rollouts) // 2
    made = [rollouts[i] for i in order[:half]]
    courses = {ANY: _course(made)}
    for said in sorted({clean_instruction(one.instruction) for one in made}):
        own = [one for one in made if clean_instruction(one.instruction) == said]
        if len(own) >= FEWEST:
            courses[said] = _course(own)
    band = Alarm(courses, Scores(), Scores(), rates, len(rollouts), max(1, int(np.median(apart))))
    found = [band.scores(rollouts[i]) for i in order[half:]]
    sunk, late = np.sort([one.sunk for one in found]), np.sort([one.late for one in found])
    failing, unsure = (
        Scores(_quantile(sunk, VALUES_PART * rate), _quantile(late, (1 - VALUES_PART) * rate)) for rate in rates
    )
    return Alarm(courses, failing, unsure, rates, band.episodes, band.every)


def _course(rollouts: Sequence[Rollout]) -> Course:
    """Mean and deviation of the value at every control step, between looks on a straight line. Beyond an episode's end
    its last value stands: it has succeeded, and stays so."""
    grid = np.arange(max(int(one.steps[-1]) for one in rollouts) + 1)
    laid = np.stack([np.interp(grid, one.steps, np.asarray(one.values) - one.values[0]) for one in rollouts])
    steps = max(1.0, float(np.median([one.steps[-1] for one in rollouts])))
    return Course(tuple(laid.mean(0).tolist()), tuple(np.maximum(laid.std(0), NARROWEST).tolist()), steps)


def _quantile(scores: np.ndarray, rate: float) -> float:
    """The least threshold that, of one more score of the same kind, is exceeded with a chance of at most `rate`."""
    place = math.ceil((1.0 - rate) * (len(scores) + 1)) - 1
    return math.inf if place >= len(scores) else float(scores[place])
