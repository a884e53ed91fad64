"""Decide what a manifest's latency budget allows. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from prts_core.io.errors import ConfigError
from prts_core.skills.manifest.resources import LatencyBudget


def over_budget(
    budget: LatencyBudget,
    *,
    per_chunk_ms: float,
    warmup_ms: float | None = None,
    load_ms: float | None = None,
    tolerance_percent: float = 0.0,
) -> Iterator[str]:
    """Which measured times are above their budget by more than the tolerance, a sentence each. A time that was not
    measured, or has no budget, is within it. ConfigError for a negative number."""
    measured = {"per_chunk_ms": per_chunk_ms, "warmup_ms": warmup_ms, "load_ms": load_ms}
    wrong = {
        k: v for k, v in (measured | {"tolerance_percent": tolerance_percent}).items() if v is not None and not v >= 0
    }
    if wrong:
        raise ConfigError("A time or a tolerance is negative", field=", ".join(wrong), found=wrong, expected=">= 0")
    for stage, time in measured.items():
        allowed = getattr(budget, stage)
        if time is not None and allowed is not None and time > allowed * (1 + tolerance_percent / 100):
            yield f"{stage} is {time:g}; the budget is {allowed:g}" + (
                f" and {tolerance_percent:g} %" if tolerance_percent else ""
            )
