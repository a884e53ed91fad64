"""Tests that may stop early: is a success rate p1 or only p0, and is one policy better than another on the same states.

Wald's sequential probability ratio test, truncated. Outcomes must come in the order of the plan, whatever order
episodes finish in: successes end sooner than failures, so that a test fed by finishing time would see too many of them
at first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from prts_core.io.errors import ConfigError
from prts_core.statistics.binomial import Interval
from prts_core.statistics.sprt_boundaries import Boundaries, first_exit, stopping_distribution

Decision = Literal["high", "low", "better", "worse", "equal", "undecided"]
SEARCHED = 20_000  # episodes, when the number that would do is looked for


@dataclass(frozen=True)
class Stop:
    """decision: high or low (one rate), better, worse or equal (a pair), undecided at the limit. at: outcomes read.

    interval: of the rate, 95 %, one that holds after such a stop (after_stopping.py); method: which. p_value: that
    a pair is equally good; at most alpha just where one was found better.
    """

    decision: Decision
    at: int
    interval: Interval | None = None
    method: str = ""
    p_value: float | None = None


@dataclass(frozen=True)
class _Test:
    """What both tests are asked for. least: outcomes before the first look: a whole round of a suite's tasks, since a
    part of one may hold the easy ones. missed: the chance of not saying so where H1 holds.
    """

    p0: float
    p1: float
    most: int
    alpha: float = 0.05
    beta: float = 0.05
    least: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.p0 < self.p1 < 1.0:
            raise ConfigError(
                "The two rates of a sequential test lie in order between 0 and 1",
                field="--stop-early",
                found=f"{self.p0:g},{self.p1:g}",
                expected="0 < p0 < p1 < 1, such as 0.75,0.90",
            )
        if not (0.0 < self.alpha < 0.5 and 0.0 < self.beta < 0.5):
            raise ConfigError(
                "An error rate must lie between 0 and 0.5",
                field="alpha, beta",
                found=f"{self.alpha:g}, {self.beta:g}",
                expected="0.05, 0.05",
            )
        if self.most < 1:
            raise ConfigError(
                "A sequential test needs episodes", field="--episodes", found=self.most, expected="at least 1"
            )

    @property
    def missed(self) -> float:
        raise NotImplementedError

    def checked(self) -> Self:
        """Itself, or a ConfigError that says how many episodes, or pairs, would do."""
        if self.missed <= self.beta:
            return self
        enough = _enough(self)
        raise ConfigError(
            f"{self.most} episodes cannot tell a success rate of {self.p1:g} from {self.p0:g} with these error rates",
            field="--stop-early",
            found=f"a chance of {self.missed:.3f} to miss it",
            expected=f"at most {self.beta:g}",
            cure=f"run {enough} episodes, or ask for a larger difference" if enough else "ask for a larger difference",
        )


@dataclass(frozen=True)
class RateTest(_Test):
    """H0: the success rate is at most `p0`. H1: it is at least `p1`. At most `most` episodes.

    alpha: chance of saying "high" under H0, at most. beta: chance of not saying it under H1; a limit too small for it
    is refused by `checked`.
    """

    @property
    def boundaries(self) -> Boundaries:
        up, down = math.log(self.p1 / self.p0), math.log((1 - self.p1) / (1 - self.p0))
        return Boundaries(up, down, self.alpha, self.beta, self.most, self.least)

    @property
    def missed(self) -> float:
        """The exact chance of not saying "high" when the rate is p1: of beta, and of running into the limit."""
        return 1.0 - self.boundaries.exact(self.p1)[0]

    def expected(self, p: float) -> float:
        """Exact mean number of episodes when the rate is `p`."""
        return self.boundaries.exact(p)[2]

    def read(self, outcomes: Sequence[bool]) -> Stop | None:
        """What the outcomes so far, in the order of the plan, say; none while they say nothing."""
        boundaries, level = self.boundaries, 0.0
        for at, success in enumerate(outcomes[: self.most], 1):
            level += boundaries.up if success else boundaries.down
            if at >= self.least and (sign := boundaries.sign(level)):
                return Stop("high" if sign > 0 else "low", at)
        return Stop("undecided", self.most) if len(outcomes) >= self.most else None

    def simulate(self, p: float, runs: int, seed: int = 0) -> tuple[float, float, float]:
        """Realised (share "high", share "low", mean episodes) of `runs` simulated benchmarks at the rate `p`."""
        sign, at, _ = self.draw(p, runs, seed)
        return float((sign > 0).mean()), float((sign < 0).mean()), float(at.mean())

    def draw(self, p: float, runs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(bound met, 0 for none; episodes; successes) of simulated benchmarks at the rate `p`, (runs,) each."""
        boundaries, rng = self.boundaries, np.random.default_rng([seed, round(p * 1e6)])
        won = rng.random((runs, self.most)) < p
        sign, at = first_exit(np.where(won, boundaries.up, boundaries.down), boundaries)
        return sign, at, won.cumsum(1)[np.arange(runs), at - 1]


@dataclass(frozen=True)
class PairedTest(_Test):
    """Two policies on the same initial states. H0: equally good. H1: rates of `p0` and `p1`, either way round.

    Only pairs in which just one of them succeeds count (Wald's test of double dichotomies, the sequential McNemar
    test): under H1 the better one wins such a pair with probability p1 (1 - p0) / (p1 (1 - p0) + p0 (1 - p1)) if the
    two outcomes are independent, more often if they agree more than that, as on shared states they do. Both directions
    are tested with alpha / 2. most: pairs.
    """

    @property
    def share(self) -> float:
        """Of the discordant pairs, those the better policy wins under H1."""
        return self.p1 * (1 - self.p0) / self._discordant

    @property
    def _discordant(self) -> float:
        """Of all pairs under H1, were the two outcomes independent."""
        return self.p1 * (1 - self.p0) + self.p0 * (1 - self.p1)

    @property
    def boundaries(self) -> Boundaries:
        """Those of one direction; a step is a discordant pair, and every one is looked at."""
        return Boundaries(
            math.log(2 * self.share), math.log(2 * (1 - self.share)), self.alpha / 2, self.beta, self.most
        )

    def read(self, pairs: Sequence[tuple[bool, bool]]) -> Stop | None:
        """pairs: (first succeeded, second succeeded) in the order of the plan. better: the first is. equal: a
        difference as large as p0 to p1 is excluded in both directions. None while they say nothing."""
        boundaries, levels, signs = self.boundaries, [0.0, 0.0], [0, 0]
        for at, (first, second) in enumerate(pairs[: self.most], 1):
            for side, won in enumerate((first, second)):
                if signs[side]:
                    continue
                if first != second:
                    levels[side] += boundaries.up if won else boundaries.down
                if at >= self.least:
                    signs[side] = boundaries.sign(levels[side])
            if 1 in signs:
                return Stop("better" if signs[0] == 1 else "worse", at, p_value=_p_value(levels))
            if signs == [-1, -1]:
                return Stop("equal", at, p_value=_p_value(levels))
        return Stop("undecided", self.most, p_value=_p_value(levels)) if len(pairs) >= self.most else None

    @property
    def missed(self) -> float:
        """The chance of not saying "better" when the rates are p1 and p0 and the outcomes independent: exact where
        `least` is 1, but for the other direction's bound, which is reached first with a chance below alpha / 2."""
        from scipy.stats import binom

        # How many of the pairs are discordant varies; a shorter walk is the beginning of the longest.
        ends = stopping_distribution(self.boundaries)
        better = ends.sign > 0
        by_length = np.bincount(ends.at[better], ends.chances(self.share)[better], self.most + 1).cumsum()
        return float(1 - binom.pmf(np.arange(self.most + 1), self.most, self._discordant) @ by_length)

    def simulate(
        self, first: float, second: float, runs: int, seed: int = 0, agreement: float = 0.0
    ) -> tuple[dict[str, float], float]:
        """Realised (share of each decision, mean pairs) of `runs` simulated comparisons at the two rates.

        agreement: how far the two share their luck, 0 independent to 1 (one draw decides both).
        """
        rng = np.random.default_rng([seed, round(first * 1e6), round(second * 1e6)])
        own = rng.random((2, runs, self.most))
        other = np.where(rng.random((runs, self.most)) < agreement, own[0], own[1])
        won, lost = own[0] < first, other < second
        moved = won != lost
        boundaries, signs, ats = replace(self.boundaries, least=self.least), [], []
        for better in (won, lost):
            steps = np.where(moved, np.where(better, boundaries.up, boundaries.down), 0.0)
            sign, at = first_exit(steps, boundaries)
            signs.append(sign)
            ats.append(at)
        sides = np.stack(signs)
        when = np.stack(ats)
        rejected = np.where(sides == 1, when, self.most + 1)
        side, at = rejected.argmin(0), rejected.min(0)
        decided = at <= self.most
        settled = (sides == -1).all(0)
        at = np.where(decided, at, np.where(settled, when.max(0), self.most))
        shares = {
            "better": float((decided & (side == 0)).mean()),
            "worse": float((decided & (side == 1)).mean()),
            "equal": float((~decided & settled).mean()),
            "undecided": float((~decided & ~settled).mean()),
        }
        return shares, float(at.mean())


def _p_value(levels: list[float]) -> float:
    """By Ville's inequality, both directions allowed for."""
    return min(1.0, 2 * math.exp(-max(levels)))


def _enough(test: _Test) -> int | None:
    """The smallest limit, to two digits, at which `test` misses no more than it says."""
    most = test.most
    while most < SEARCHED:
        most = math.ceil(most * 1.15)
        if replace(test, most=most).missed <= test.beta:
            digits = max(0, len(str(most)) - 2)
            return -(-most // 10**digits) * 10**digits
    return None
