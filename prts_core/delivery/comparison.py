"""Compare two runs of the same suites, episode by episode: the gate's verdict on each, corrected for their number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prts_core.delivery.gate import KEY, decide, policy_episodes, shared_confidence
from prts_core.delivery.suite_results import computed_in
from prts_core.io.errors import DataError
from prts_core.io.files import read_json
from prts_core.statistics.binomial import holm


def compare_runs(
    earlier: Mapping[str, Path], later: Mapping[str, Path], *, margin: float, alpha: float = 0.05
) -> dict[str, Any]:
    """Suite -> folder with episodes.parquet and report.json, on both sides.

    Where one side stopped early, the episodes that both ran are compared, by bounds and a p-value that hold then (the
    sequential test's own where the later run was stopped by comparing). A suite is worse where the later run wins
    fewer pairs and Holm's adjusted McNemar p-value is at most alpha; promote: the gate says so on every suite, and none
    is worse. Raises DataError where protocols differ or no episode is shared.
    """
    suites: dict[str, dict[str, Any]] = {}
    for name, folder in later.items():
        labels, stops = _same_protocol(earlier[name], folder)
        before, now = policy_episodes(earlier[name] / "episodes.parquet"), policy_episodes(folder / "episodes.parquet")
        shared = now.join(before.select(KEY), on=list(KEY), how="semi")
        if shared.is_empty():
            raise DataError("The two runs share no episode", file=folder, found=name, cure="use the same --seed")
        only = (now.height - shared.height, before.height - shared.height)
        theirs = before.join(shared.select(KEY), on=list(KEY), how="semi")
        confidence = shared_confidence(len(later))
        verdict = decide(shared, theirs, margin, floor=None, confidence=confidence, stopped=any(stops)).to_json()
        own = (stops[1] or {}).get("p_value")
        suites[name] = (
            verdict
            | {"labels": labels, "unpaired": list(only), "stopped": any(stops)}
            | ({} if own is None else {"p_value": own})
        )
    adjusted = holm({name: one["p_value"] for name, one in suites.items()})
    for name, one in suites.items():
        one["p_holm"] = adjusted[name]
    worse = [n for n, one in suites.items() if one["p_holm"] <= alpha and one["only_challenger"] < one["only_champion"]]
    return {
        "suites": suites,
        "alpha": alpha,
        "margin": margin,
        "worse": worse,
        "promote": not worse and all(one["promote"] for one in suites.values()),
    }


def _same_protocol(before: Path, now: Path) -> tuple[list[str], list[dict[str, Any] | None]]:
    """(the labels of both, how either stopped early); DataError with the fields in which the protocols differ."""
    theirs, ours = read_json(before / "report.json"), read_json(now / "report.json")
    if theirs.get("protocol") != ours["protocol"]:
        mine, other = ours["protocol"], theirs.get("protocol") or {}
        fields = [name for name in {**mine, **other} if mine.get(name) != other.get(name)]
        raise DataError(
            "Two runs under different protocols are not compared",
            file=before,
            field=", ".join(fields),
            found="; ".join(f"{name}: {other.get(name)!r:.80} then, {mine.get(name)!r:.80} now" for name in fields),
            cure="run the earlier policy again under the present protocol",
        )
    labels, dtypes = {*theirs.get("labels", []), *ours["labels"]}, (computed_in(theirs), computed_in(ours))
    if dtypes[0] != dtypes[1]:
        labels.add(f"computed in {dtypes[0]} then, in {dtypes[1]} now")
    stops = [report.get("stopped_early") for report in (theirs, ours)]
    return sorted(labels), stops
