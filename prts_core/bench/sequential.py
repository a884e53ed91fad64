"""`prts bench sequential`: what early stopping saves; error rates and coverage it realises in 10,000 simulated runs.

The case is 0.90 against 0.75 with at most 500 episodes and alpha = beta = 0.05.
"""

from __future__ import annotations

from rich.console import Console

from prts_core.bench.report import Row
from prts_core.statistics.after_stopping import coverage
from prts_core.statistics.sprt import PairedTest, RateTest

LOW, HIGH, MOST, LEVEL, RUNS = 0.75, 0.90, 500, 0.05, 10_000
COVERED = (0.60, LOW, 0.77, 0.82, HIGH, 0.95)  # rates whose interval after the stop is held against them
SAVED = "<= 0.6"  # at least 40 % of the episodes


def run(console: Console) -> list[Row]:
    """Rows of one rate and of a pair: episodes against those of the fixed design, errors against what is stated, how
    often the interval after the stop covers the rate."""
    one, pair = RateTest(LOW, HIGH, MOST, LEVEL, LEVEL).checked(), PairedTest(LOW, HIGH, MOST, LEVEL, LEVEL).checked()
    note = f"{RUNS} simulated benchmarks a row; H0 {LOW:g}, H1 {HIGH:g}, at most {MOST} episodes"
    rows = []
    for rate, wrong in ((LOW, "says high under H0 (alpha)"), (HIGH, "misses high under H1 (beta)")):
        high, _, episodes = one.simulate(rate, RUNS)
        error = high if rate == LOW else 1 - high
        rows += _saved(f"one rate of {rate:g}", "episodes", episodes, wrong, error, note)
        console.print(f"one rate of {rate:g}: exactly {one.expected(rate):.1f} episodes on average", highlight=False)
    for rate in COVERED:
        ours, plain = coverage(one, rate, RUNS)
        what, wilson = f"one rate of {rate:g}: interval after the stop covers it", "a Wilson interval covers it"
        console.print(f"{what} {ours:.3f} of the time, {wilson} {plain:.3f}", highlight=False)
        shown = f"{note}; {wilson} {plain:.3f} of the time"
        rows.append(Row(what, ours, 0.95, "share", "higher", ">= 1.0", shown))
    for first, second, agreement in ((HIGH, LOW, 0.0), (HIGH, LOW, 0.5), (HIGH, HIGH, 0.0), (LOW, LOW, 0.0)):
        shares, pairs = pair.simulate(first, second, RUNS, agreement=agreement)
        case = f"pair of {first:g} and {second:g}" + (f", agreement {agreement:g}" if agreement else "")
        wrong = "says one is better (alpha)" if first == second else "misses the better one (beta)"
        error = shares["better"] + shares["worse"] if first == second else 1 - shares["better"]
        rows += _saved(case, "pairs", pairs, wrong, error, note)
    return rows


def _saved(case: str, unit: str, mean: float, wrong: str, error: float, note: str) -> list[Row]:
    return [
        Row(f"{case}: mean {unit}", mean, MOST, unit, "lower", SAVED, note),
        Row(f"{case}: {wrong}", error, LEVEL, "share", "lower", "<= 1.0", note),
    ]
