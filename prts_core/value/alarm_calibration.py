"""Calibrate a policy's alarm on its benchmark's episodes, and tell of others how often it errs and what it catches."""

from __future__ import annotations

import numpy as np
import polars as pl

from prts_core.io.errors import DataError
from prts_core.value.alarm import Alarm, Rollout, Watch, calibrate


def alarm_of(episodes: pl.DataFrame) -> tuple[Alarm | None, dict[str, float]]:
    """(an alarm calibrated on two thirds of the policy's successful rollouts; how often it is raised in the others, and
    in rollouts that failed, of any condition, and after what share of those it is raised). None where there are too
    few."""
    scored = episodes.filter(pl.col("values").list.len() > 0)
    told: dict[bool, list[Rollout]] = {True: [], False: []}
    for row in scored.iter_rows(named=True):
        if row["condition"] == "policy" or not row["success"]:
            seen = np.array(row["value_rows"]), np.array(row["values"])
            told[bool(row["success"])].append(Rollout(row["instruction"], *seen))
    order = np.random.default_rng(0).permutation(len(told[True]))
    cut = 2 * len(order) // 3
    try:
        alarm = calibrate([told[True][i] for i in order[:cut]])
    except DataError:
        return None, dict.fromkeys(("alarm_false", "alarm_caught", "alarm_after"), float("nan"))

    def raised(one: Rollout) -> float:
        """The share of the episode's looks before the one at which it is; NaN: it is not."""
        watch = Watch(alarm, one.instruction)
        for at, (step, value) in enumerate(zip(one.steps.tolist(), one.values.tolist(), strict=True)):
            if watch.saw(step, value) == "failing":
                return at / len(one.steps)
        return float("nan")

    false, caught = (np.array([raised(one) for one in some]) for some in (told[True], told[False]))
    false = false[order[cut:]]
    found = {
        "alarm_false": float(np.mean(~np.isnan(false))) if len(false) else np.nan,
        "alarm_caught": float(np.mean(~np.isnan(caught))) if len(caught) else np.nan,
        "alarm_after": float(np.nanmedian(caught)) if (~np.isnan(caught)).any() else np.nan,
    }
    return alarm, found
