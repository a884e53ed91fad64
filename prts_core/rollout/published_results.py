"""Success rates that others have published, and whether one may stand beside ours: only under the same protocol.

The numbers are data (published_results.yaml), each with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.checks import Strict
from prts_core.io.errors import ConfigError, lookup
from prts_core.statistics.binomial import wilson

FILE = Path(__file__).with_suffix(".yaml")
TASKS = {"libero_90": 90, "libero_130": 130}  # of a suite, where they are not ten
TEN = 10
HEADER = ["policy", "success, %", "95 % interval", "source"]


@dataclass(frozen=True)
class Protocol(Strict):
    """How a published number was measured; none: its source does not say. max_steps: by suite, settling not counted."""

    source: str
    episodes_per_task: int | None
    initial_states: Literal["stored", "drawn"] | None
    settle_steps: int | None
    max_steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedResult(Strict):
    """One source's numbers as they stand in the file. success: suite -> percent."""

    model: str
    source: str
    protocol: str
    success: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Listing(Strict):
    """The whole file."""

    protocols: dict[str, Protocol]
    baselines: tuple[PublishedResult, ...]


@dataclass(frozen=True)
class PublishedBaseline:
    """One published number. rate: 0 to 1. episodes: in all, where known. why_not: what keeps it from standing beside
    the result it was held against; empty where the protocols are the same."""

    model: str
    suite: str
    rate: float
    episodes: int | None
    source: str
    note: str
    why_not: tuple[str, ...] = ()


@cache
def listing(path: Path = FILE) -> Listing:
    """The file, checked. ConfigError names what is wrong: an unknown key, a protocol nobody defined, a rate above 100,
    a number that stands twice."""
    read = check(Listing, read_yaml(path), path)
    seen: set[tuple[str, str]] = set()
    for entry in read.baselines:
        lookup(read.protocols, entry.protocol, "protocol of a published number")
        for suite, percent in entry.success.items():
            if not 0.0 <= percent <= 100.0 or (entry.model, suite) in seen:
                raise ConfigError(
                    "A published success rate is no percentage, or stands twice",
                    file=path,
                    field=f"{entry.model}: {suite}",
                    found=percent,
                    expected="one number from 0 to 100",
                )
            seen.add((entry.model, suite))
    return read


def beside(protocol: Mapping[str, Any], episodes: int, path: Path = FILE) -> list[PublishedBaseline]:
    """What others have published on the suite of `protocol`, best first, each with what differs.

    protocol: a benchmark's own (prts_core.rollout.episode_plan.Plan.protocol). episodes: how many of it were run.
    """
    read, suite = listing(path), str(protocol["suite"])
    found = []
    for entry in read.baselines:
        if suite in entry.success:
            how = read.protocols[entry.protocol]
            per_task, tasks = how.episodes_per_task, TASKS.get(suite, TEN)
            found.append(
                PublishedBaseline(
                    entry.model,
                    suite,
                    entry.success[suite] / 100,
                    None if per_task is None else per_task * tasks,
                    entry.source,
                    entry.note,
                    differences(protocol, episodes, how),
                )
            )
    return sorted(found, key=lambda one: -one.rate)


def differences(protocol: Mapping[str, Any], episodes: int, published: Protocol) -> tuple[str, ...]:
    """In words, everything that keeps our result and a published one from being the same measurement."""
    suite, tasks = str(protocol["suite"]), list(protocol["tasks"])
    said = []
    if protocol["standins"]:
        said.append("ours ran on stand-in assets")
    if protocol["perturbation"] or any(task["perturbation"] for task in tasks):
        said.append("ours is perturbed")
    whole = TASKS.get(suite, TEN)
    if len(tasks) != whole:
        said.append(f"ours has {len(tasks)} of the {whole} tasks")
    if published.episodes_per_task is None:
        said.append("its number of episodes is not stated")
    elif episodes != len(tasks) * published.episodes_per_task:
        said.append(f"{published.episodes_per_task} episodes a task there, {episodes / max(1, len(tasks)):g} here")
    states = "drawn" if any(task["initial_states"] == 0 for task in tasks) else "stored"
    if published.initial_states is None:
        said.append("its initial states are not stated")
    elif published.initial_states != states:
        said.append(f"initial states {published.initial_states} there, {states} here")
    if published.settle_steps is None:
        said.append("its settling steps are not stated")
    elif published.settle_steps != protocol["settle_steps"]:
        said.append(f"{published.settle_steps} settling steps there, {protocol['settle_steps']} here")
    limit, ours = published.max_steps.get(suite), sorted({int(task["max_steps"]) for task in tasks})
    if limit is None:
        said.append("its step limit is not stated")
    elif ours != [limit]:
        said.append(f"at most {limit} steps there, {', '.join(map(str, ours))} here")
    return tuple(said)


def table(
    found: list[PublishedBaseline],
    ours: str,
    successes: int,
    episodes: int,
    standins: str = "",
    bounds: tuple[float, float] | None = None,
) -> list[list[str]]:
    """Rows (policy, success in percent, 95 % interval, source): ours, then what may stand beside it.

    ours: what our policy is called; `standins` is said with it. bounds: of its rate; none: Wilson's.
    """

    def percent(rate: float) -> str:
        return f"{100 * rate:.1f}"

    def interval(won: int, n: int) -> tuple[float, float]:
        made = wilson(won, n)
        return made.lower, made.upper

    def shown(low: float, high: float) -> str:
        return f"{percent(low)} - {percent(high)}"

    label = f"{ours} (stand-in assets)" if standins else ours
    rows = [[label, percent(successes / episodes), shown(*(bounds or interval(successes, episodes))), "this run"]]
    for one in found:
        if not one.why_not and one.episodes:
            source = one.source + (f"; {one.note}" if one.note else "")
            theirs = shown(*interval(round(one.rate * one.episodes), one.episodes))
            rows.append([one.model, percent(one.rate), theirs, source])
    return rows


def published(
    protocol: Mapping[str, Any], successes: int, episodes: int, bounds: tuple[float, float] | None = None
) -> dict[str, Any]:
    """What a report says of others: {"header", "rows": ours and what may stand beside it, "refused": why not the rest}.

    Empty where nothing published on the suite is on file. bounds: of our rate; none: Wilson's.
    """
    found = beside(protocol, episodes)
    if not found:
        return {}
    rows = table(found, "this policy", successes, episodes, str(protocol["standins"]), bounds)
    return {"header": HEADER, "rows": rows, "refused": refusals(found)}


def refusals(found: list[PublishedBaseline]) -> list[str]:
    """Why the others do not stand there, a sentence each."""
    return [
        f"{one.model} ({100 * one.rate:.1f} %, {one.source}) is not shown beside ours: {'; '.join(one.why_not)}."
        for one in found
        if one.why_not
    ]
