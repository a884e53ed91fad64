"""Decide what a manifest's numbers and lists allow: tasks, time, several skills on one GPU. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prts_core.io.errors import ConfigError
from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.resources import LatencyBudget

MEMORY_MARGIN_GB = 0.5  # of skills that share a GPU


def covers_task(manifest: Manifest, task: str, scene: str | None = None) -> bool | None:
    """Whether `evaluated_tasks` has a task, by its id ("libero_spatial/3"), a family above it or its scene's id; none
    where the manifest names no tasks, which forbids none."""
    if not manifest.evaluated_tasks:
        return None
    return any(task == entry or task.startswith(f"{entry}/") or scene == entry for entry in manifest.evaluated_tasks)


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


def memory_together_gb(skills: Sequence[Manifest]) -> float | None:
    """GPU memory of skills that are loaded at once (a policy and its reward model), each in its own dtype, with a
    margin; none where one of them does not say."""
    needs = [skill.memory_gb for skill in skills]
    return None if None in needs else sum(need for need in needs if need is not None) + MEMORY_MARGIN_GB
