"""Compare two policies on one suite: is the challenger no worse than the champion, or has it fallen behind?

Both sides must have run the same episodes (task, initial state, seed), so that the comparison is paired.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from prts_core.io.errors import DataError
from prts_core.statistics import anytime_valid
from prts_core.statistics.binomial import mcnemar_exact, paired_difference, wilson

CONFIDENCE = 0.95
KEY = ("task", "initial_state", "seed")
NEEDED = ("task", "seed", "success")  # the chain's own benchmark draws the initial state from the seed: it has but one


Against = Literal["alarm", "margin", "floor"]


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one suite.

    against: what speaks against promotion; empty: nothing. lower, upper: bounds, 95 % unless it was asked for others,
    of (challenger - champion); without a champion, of the challenger's own success rate. own_lower: that rate's lower
    bound. only_challenger, only_champion: pairs in which just that one succeeded. p_value: exact McNemar, with a
    champion. stopped: the bounds are those that hold whenever one stops.
    """

    against: tuple[Against, ...]
    lower: float
    upper: float
    n_pairs: int
    challenger_rate: float
    own_lower: float
    margin: float
    floor: float | None
    champion_rate: float | None = None
    only_challenger: int = 0
    only_champion: int = 0
    p_value: float | None = None
    stopped: bool = False

    @property
    def promote(self) -> bool:
        return not self.against

    @property
    def alarm(self) -> bool:
        return "alarm" in self.against

    @property
    def reason(self) -> str:
        """The verdict in words, with its figures."""
        own = (
            f"success rate {self.challenger_rate:.3f} on {self.n_pairs} episodes, Wilson lower bound "
            f"{self.own_lower:.3f} {'does not exceed' if 'floor' in self.against else 'exceeds'} the floor "
            f"{self.floor or 0:g}"
        )
        if self.champion_rate is None:
            return f"no champion yet: {own}"
        enough = "does not exceed" if "margin" in self.against else "exceeds"
        said = [f"the lower bound {enough} the margin {self.margin:g}"]
        said += ["the upper bound is below 0: worse than the champion"] if self.alarm else []
        said += [own] if "floor" in self.against else []
        early = "; stopped early: bounds that hold then" if self.stopped else ""
        return (
            f"challenger - champion = {self.challenger_rate - self.champion_rate:+.3f} [{self.lower:+.3f}, "
            f"{self.upper:+.3f}] on {self.n_pairs} paired episodes ({self.only_challenger} won, {self.only_champion} "
            f"lost{early}); {'; '.join(said)}"
        )

    def to_json(self) -> dict[str, Any]:
        said = {"promote": self.promote, "alarm": self.alarm, "reason": self.reason}
        return asdict(self) | {"against": list(self.against)} | said


def policy_episodes(path: Path) -> pl.DataFrame:
    """task, initial_state, seed, success of the policy's own episodes in a benchmark's `episodes.parquet`.

    Where the benchmark has controls, those are the ones with condition == "policy".
    """
    try:
        frame = pl.read_parquet(path)
    except FileNotFoundError as err:
        raise DataError("A benchmark's episodes are missing", file=path, cure="run `prts benchmark`") from err
    except (pl.exceptions.PolarsError, OSError) as err:
        raise DataError(
            "A benchmark's episodes cannot be read", file=path, found=" ".join(str(err).split())[:200]
        ) from err
    if "condition" in frame.columns:
        frame = frame.filter(pl.col("condition") == "policy")
    return _checked(frame, str(path))


def decide(
    challenger: pl.DataFrame,
    champion: pl.DataFrame | None,
    margin: float,
    floor: float | None,
    confidence: float = CONFIDENCE,
    *,
    stopped: bool = False,
) -> Verdict:
    """Promote if the lower bound of (challenger - champion) exceeds `margin`, the challenger's own rate is above
    `floor`, and there is no alarm; alarm if the upper bound is below 0.

    challenger, champion: one row an episode with columns task, seed, success and, where a task has several initial
    states, initial_state. The difference of the two success rates is bounded by Tango's score interval on the pairs.
    floor: what the Wilson lower bound of the challenger's rate must exceed, with a champion and without; none: nothing.
    Without a champion there is nothing to raise an alarm about. confidence: of the interval; where one policy is judged
    on several suites, each gets a wider one, so that the chance of one false alarm among them keeps its level (see
    `shared_confidence`). stopped: a run may have ended because of how it went; the difference and its p-value are then
    those that hold whenever one stops.

    Raises DataError when an episode stands twice, is missing on one side, or has no outcome.
    """
    ours = _checked(challenger, "challenger")
    alone = wilson(int(ours["success"].sum()), ours.height, confidence)
    low: tuple[Against, ...] = () if floor is None or alone.lower > floor else ("floor",)
    if champion is None:
        return Verdict(low, alone.lower, alone.upper, ours.height, alone.estimate, alone.lower, margin, floor)

    theirs = _checked(champion, "champion")
    _require_same_episodes(ours, theirs)
    pairs = ours.join(theirs, on=list(KEY), suffix="_champion", validate="1:1")
    gained = pairs.filter(pl.col("success") & ~pl.col("success_champion")).height
    lost = pairs.filter(~pl.col("success") & pl.col("success_champion")).height
    bounds = (anytime_valid.paired_difference if stopped else paired_difference)(gained, lost, pairs.height, confidence)
    worse: tuple[Against, ...] = ("alarm",) if bounds.upper < 0.0 else ()
    doubtful: tuple[Against, ...] = () if bounds.lower > margin else ("margin",)
    return Verdict(
        against=worse + doubtful + low,
        lower=bounds.lower,
        upper=bounds.upper,
        n_pairs=pairs.height,
        challenger_rate=alone.estimate,
        own_lower=alone.lower,
        margin=margin,
        floor=floor,
        champion_rate=int(theirs["success"].sum()) / theirs.height,
        only_challenger=gained,
        only_champion=lost,
        p_value=anytime_valid.mcnemar(gained, lost) if stopped else mcnemar_exact(gained, lost),
        stopped=stopped,
    )


def shared_confidence(suites: int) -> float:
    """Of each suite's interval when one policy is judged on so many (Bonferroni): a verdict does not change when
    another suite's result comes in later, as Holm's would."""
    return 1.0 - (1.0 - CONFIDENCE) / max(1, suites)


def _checked(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """Key and outcome, one row an episode, no outcome missing; in the order of the key."""
    missing = [column for column in NEEDED if column not in frame.columns]
    if missing:
        raise DataError(f"The episodes of {name} lack columns", field=", ".join(missing), found=frame.columns)
    state = pl.col("initial_state") if "initial_state" in frame.columns else pl.lit(0).alias("initial_state")
    out = frame.select(
        pl.col("task").cast(pl.String), state.cast(pl.Int64), pl.col("seed").cast(pl.Int64), pl.col("success")
    )
    if out.is_empty():
        raise DataError(f"The {name} has no episodes", expected="at least one", cure="run `prts benchmark` again")
    if out.schema["success"] != pl.Boolean:
        raise DataError(
            f"The outcomes of {name} are not true or false", field="success", found=str(out.schema["success"])
        )
    if any(out.null_count().row(0)):
        raise DataError(
            f"Episodes of {name} have no task, seed or outcome",
            found=f"nulls {out.null_count().to_dicts()}",
        )
    twice = out.filter(out.select(KEY).is_duplicated()).select(KEY).unique(maintain_order=True)
    if not twice.is_empty():
        raise DataError(
            f"An episode of {name} stands twice",
            field=", ".join(KEY),
            found=_some(twice),
            expected="one row for each task, initial state and seed",
            cure="compare one benchmark run with one benchmark run",
        )
    return out.sort(KEY)


def _require_same_episodes(ours: pl.DataFrame, theirs: pl.DataFrame) -> None:
    only_ours = ours.join(theirs, on=list(KEY), how="anti").sort(KEY)
    only_theirs = theirs.join(ours, on=list(KEY), how="anti").sort(KEY)
    if only_ours.is_empty() and only_theirs.is_empty():
        return
    parts = []
    if not only_ours.is_empty():
        parts.append(f"{only_ours.height} only of the challenger ({_some(only_ours)})")
    if not only_theirs.is_empty():
        parts.append(f"{only_theirs.height} only of the champion ({_some(only_theirs)})")
    raise DataError(
        "Challenger and champion did not run the same episodes, so that they cannot be compared in pairs",
        field=", ".join(KEY),
        found="; ".join(parts),
        expected=f"the same tasks, initial states and seeds on both sides ({ours.height} and {theirs.height} episodes)",
        cure="benchmark the champion again with the present tasks, episodes and seed, then compare",
    )


def _some(frame: pl.DataFrame) -> str:
    shown = ", ".join(
        f"{task} seed {seed}" + (f" initial state {state}" if state else "")
        for task, state, seed in frame.select(KEY).head(3).iter_rows()
    )
    return shown + (", ..." if frame.height > 3 else "")
