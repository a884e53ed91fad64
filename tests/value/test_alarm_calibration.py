"""An alarm is calibrated on a policy's successes and judged on others: how often it errs and catches."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from prts_core.rollout.results import SCHEMA
from prts_core.value.alarm import Alarm
from prts_core.value.alarm_calibration import alarm_of


def episodes(successes: int, failures: int) -> pl.DataFrame:
    """As a benchmark writes them: values that rise by about .2 a step where the episode succeeds, and else neither rise
    nor does it end before its limit."""
    rng = np.random.default_rng(0)
    rows = []
    for at in range(successes + failures):
        won = at < successes
        steps = np.arange(0, 2 * int(rng.integers(12, 20)) if won else 80, 2)
        values = rng.normal(-8, 3) + (0.2 if won else 0.0) * steps + rng.normal(0, 0.3, len(steps))
        condition = "policy" if won or at % 2 else "noisy"
        row = {"condition": condition, "instruction": "push", "success": won}
        rows.append(row | {"value_rows": steps.tolist(), "values": values.tolist()})
    rows.append({"condition": "expert", "instruction": "push", "success": True, "value_rows": [], "values": []})
    return pl.DataFrame(rows, schema={name: SCHEMA[name] for name in rows[0]})


def test_an_alarm_is_made_and_judged_on_other_episodes():
    alarm, told = alarm_of(episodes(150, 60))
    assert alarm is not None and alarm.episodes == 100 and alarm.every == 2
    assert told["alarm_false"] <= 0.15 and told["alarm_caught"] >= 0.9 and 0.2 < told["alarm_after"] < 0.8
    assert Alarm.from_json(alarm.to_json()) == alarm


def test_too_few_successes_give_none_and_no_failure_gives_no_rate():
    alarm, told = alarm_of(episodes(12, 5))
    assert alarm is None and all(math.isnan(figure) for figure in told.values())
    alarm, told = alarm_of(episodes(90, 0))
    assert alarm is not None and math.isnan(told["alarm_caught"])
