"""Warn where no robot can have done what was recorded: limits, jumps, stuck sensors, copies, commands that are none.

The format holds, but a person should look. Laws see summaries of whole episodes (`EpisodeSummary`) and the Contract.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from prts_core.contract import Contract, Dimension
from prts_core.data.lerobot_v21.schema import ACTION, STATE, Info
from prts_core.data.validation.episode import EpisodeSummary
from prts_core.data.validation.report import Finding

# Beyond these a number is hardly what its unit says: degrees called radians, millimetres called metres.
LIMITS = {"rad": 4 * np.pi, "deg": 720.0, "m": 10.0, "cm": 1000.0, "mm": 10_000.0, "rad/s": 50.0, "m/s": 20.0}
GRIPPER_SLACK = 0.05  # of the convention's range
JUMP = 20.0  # times the largest step of the median episode, and as often its own usual step
FROZEN_S = 0.5  # seconds in which the action moves and no digit of the state changes
REPEATED = 0.2  # share of rows whose state is the row's before while the action moves
SHOWN = 8  # findings of one law; the rest is counted
# (the episode, or none for the dataset; row; found; expected; cure)
Case = tuple[EpisodeSummary | None, int | None, str, str, str]


def check_physics(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """Warnings of every law: the first few and how many more, for one wrong unit breaks every episode."""
    for check, law in LAWS.items():
        found = (
            Finding(check, info.data_name(of.episode) if of else "meta/info.json", text, expected, cure, row, "warning")
            for of, row, text, expected, cure in law(facts, contract, info)
        )
        yield from islice(found, SHOWN)
        for left, last in deque(enumerate(found, 1), maxlen=1):
            yield replace(last, found=f"{left} more like these", row=None)


def law_limits(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """Every dimension stays within the limits that the Contract declares, else within what its unit, or for gripper
    commands their convention, lets expect."""
    if contract is None:
        return
    named = {STATE: contract.state, ACTION: contract.action}
    bounds = {key: [_expected(key, dim, contract.gripper) for dim in dims] for key, dims in named.items()}
    for episode in facts:
        for out in episode.outside:
            dim = named[out.key][out.index]
            low, high = dim.limits or (-np.inf, np.inf)
            found = f"{out.key}.{dim.name} (dimension {out.index}) goes to {out.value:.6g} {dim.unit}"
            found += f" and leaves its limits in {out.rows} rows"
            cure = "leave the episode out, or correct limits: in the robot's YAML"
            yield episode, out.row, found, f"{low:g} to {high:g}, declared", cure
        for key, series in episode.series.items():
            if len(series.low) != len(bounds[key]):
                continue
            for dim, bound, low, high in zip(named[key], bounds[key], series.low, series.high, strict=True):
                if bound is not None and not (bound[0] <= low and high <= bound[1]):
                    found = f"{key}.{dim.name} reaches from {low:.4g} to {high:.4g} {dim.unit}"
                    cure = "correct the unit or the convention in the robot's YAML, or the data"
                    yield episode, None, found, f"{bound[0]:.4g} to {bound[1]:.4g}", cure


def _expected(key: str, dimension: Dimension, convention: str) -> tuple[float, float] | None:
    """Bounds of a dimension that declares none: for commands without a unit to a gripper, the two numbers of a
    convention such as "-1 opens, +1 closes"; else its unit's."""
    if dimension.limits:
        return None
    ends = [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", convention)]
    if key == ACTION and is_gripper(dimension) and dimension.unit in ("1", "unknown") and len(ends) > 1:
        slack = GRIPPER_SLACK * (max(ends) - min(ends))
        return min(ends) - slack, max(ends) + slack
    bound = LIMITS.get(dimension.unit)
    return None if bound is None else (-bound, bound)


def is_gripper(dimension: Dimension) -> bool:
    return "grip" in dimension.name.lower()


def law_jumps(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """No state jumps: its largest step is at most 20 times that of the median episode and its own usual step. Grippers
    may go from end to end in one row."""
    known = [(episode, episode.series[STATE]) for episode in facts if STATE in episode.series]
    widths = {len(series.step) for _, series in known}
    if len(widths) != 1:
        return
    dimensions = contract.state if contract is not None else ()
    if len(dimensions) not in widths:
        dimensions = tuple(Dimension(str(index)) for index in range(widths.pop()))
    arms = ~np.array([is_gripper(dimension) for dimension in dimensions])
    median = np.median([series.step for _, series in known], axis=0) if len(known) > 2 else 0.0
    for episode, series in known:
        bound = JUMP * np.maximum(series.usual, median)
        for index in np.flatnonzero((series.step > bound) & (series.usual > 0) & arms):
            found = f"{STATE}.{dimensions[index].name} jumps by {series.step[index]:.4g} in one row"
            cure = "look at the row: a lost sample, a wrapped angle or a restarted recording"
            yield episode, int(series.at[index]), found, f"steps of about {series.usual[index]:.2g}", cure


def law_frozen(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """While the action moves the state does: no half second without a changed digit."""
    bound = _frozen_rows(info)
    for episode in facts:
        start, length = episode.frozen
        if length >= bound:
            found = f"{STATE} stands still for {length} rows while the action moves"
            cure = "the state's source had stopped: leave the episode out, or cut it"
            yield episode, start, found, f"fewer than {bound} rows", cure


def law_duplicated(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """While the action moves, few rows repeat the state before."""
    for episode in facts:
        rows = len(episode.motion) + 1
        if episode.frozen[1] < _frozen_rows(info) and rows >= 20 and episode.repeated > REPEATED * rows:
            found = f"{episode.repeated} of {rows} rows repeat the state of the row before"
            cure = "the state comes slower than fps says: record it at its own rate"
            yield episode, None, found, f"at most {REPEATED:.0%}", cure


def _frozen_rows(info: Info) -> int:
    return max(8, round(FROZEN_S * info.fps))


def law_gripper(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """A gripper moves in some episode, or is held as the task demands: the same in all episodes of a task, and not the
    same in all tasks."""
    named = {} if contract is None else {STATE: contract.state, ACTION: contract.action}
    for key, dimensions in named.items():
        known = [
            (e.tasks, e.series[key]) for e in facts if key in e.series and len(e.series[key].low) == len(dimensions)
        ]
        for index, dimension in enumerate(dimensions):
            if not known or not is_gripper(dimension) or any(s.low[index] != s.high[index] for _, s in known):
                continue
            held: dict[tuple[int, ...], set[float]] = {}
            for tasks, series in known:
                held.setdefault(tasks, set()).add(float(series.low[index]))
            if any(len(values) > 1 for values in held.values()) or len(set.union(*held.values())) == 1:
                found = f"{key}.{dimension.name} never moves within any episode"
                expected = "a gripper that moves, or that every task holds in its own way"
                yield None, None, found, expected, "check that the right column was converted"


def law_copies(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """No two episodes hold the same states and actions."""
    seen: dict[str, int] = {}
    for episode in facts:
        first = seen.setdefault(episode.digest, episode.episode)
        if episode.digest and first != episode.episode:
            found = f"the states and actions of episode {first} again"
            yield episode, None, found, "every episode once", "leave one of them out with source.episodes"


def law_shift(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Case]:
    """Actions are commands, not the recorded states of the same or a later row."""
    known = [episode for episode in facts if episode.digest]
    shifted = [episode.shift for episode in known if episode.shift is not None]
    if shifted and len(shifted) >= 0.9 * len(known):
        shift = max(set(shifted), key=shifted.count)
        where = "of the same row" if shift == 0 else f"of {shift} row{'s' * (shift > 1)} later"
        found = f"{ACTION} is {STATE} {where} in {len(shifted)} of {len(known)} episodes"
        cure = "fit for policies of positions only: a policy learns to repeat what it sees; record the leader's or the"
        yield None, None, found, "commands that were sent to the robot", f"{cure} controller's commands"


LAWS: dict[str, Callable[[Sequence[EpisodeSummary], Contract | None, Info], Iterator[Case]]] = {
    "limits": law_limits,
    "jumps": law_jumps,
    "frozen": law_frozen,
    "duplicated": law_duplicated,
    "gripper": law_gripper,
    "copies": law_copies,
    "action shift": law_shift,
}
