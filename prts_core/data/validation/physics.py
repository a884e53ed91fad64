"""Is it plausible that a robot did this? Limits, jumps, stuck sensors, copies, commands that are no commands.

All of it warns: the format holds, but a person should look. It knows `Facts` of whole episodes and the Contract's
names, units and gripper convention; no pixels (`videos.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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


def check_physics(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """Findings of all laws of this module."""
    for law in (law_limits, law_jumps, law_frozen, law_gripper, law_copies, law_shift):
        yield from _first(law(facts, contract, info))


def _first(findings: Iterator[Finding]) -> Iterator[Finding]:
    """The first few and how many more: one wrong unit breaks every episode."""
    left, last = 0, None
    for number, finding in enumerate(findings):
        if number < SHOWN:
            yield finding
        else:
            left, last = left + 1, finding
    if last is not None:
        yield Finding(last.check, last.file, f"{left} more like these", last.expected, last.cure, severity="warning")


def law_limits(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """Every dimension stays within the limits that the Contract declares, else within what its unit, or for gripper
    commands their convention, lets expect."""
    if contract is None:
        return
    bounds = {
        STATE: [_unit_limits(dim) for dim in contract.state],
        ACTION: [
            None if dim.limits else _gripper_limits(dim, contract.gripper) or _unit_limits(dim)
            for dim in contract.action
        ],
    }
    named = {STATE: contract.state, ACTION: contract.action}
    for episode in facts:
        for out in episode.outside:
            dimension = named[out.key][out.index]
            low, high = dimension.limits or (-np.inf, np.inf)
            yield _warning(
                "limits",
                info,
                episode,
                f"{out.key}.{dimension.name} (dimension {out.index}) goes to {out.value:.6g}"
                f" {dimension.unit} and leaves its limits in {out.rows} rows",
                f"{low:g} to {high:g}, declared",
                "leave the episode out, or correct limits: in the robot's YAML",
                out.row,
            )
        for key, series in episode.series.items():
            if len(series.low) != len(bounds[key]):
                continue
            for index, bound in enumerate(bounds[key]):
                low, high = series.low[index], series.high[index]
                if bound is not None and not (bound[0] <= low and high <= bound[1]):
                    name, unit = named[key][index].name, named[key][index].unit
                    yield _warning(
                        "limits",
                        info,
                        episode,
                        f"{key}.{name} reaches from {low:.4g} to {high:.4g} {unit}",
                        f"{bound[0]:.4g} to {bound[1]:.4g}",
                        "correct the unit or the convention in the robot's YAML, or the data",
                    )


def _unit_limits(dimension: Dimension) -> tuple[float, float] | None:
    bound = None if dimension.limits else LIMITS.get(dimension.unit)
    return None if bound is None else (-bound, bound)


def _gripper_limits(dimension: Dimension, convention: str) -> tuple[float, float] | None:
    """The two numbers of a convention such as "-1 opens, +1 closes", for commands without a unit of their own."""
    ends = [float(number) for number in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", convention)]
    if not is_gripper(dimension) or dimension.unit not in ("1", "unknown") or len(ends) < 2:
        return None
    slack = GRIPPER_SLACK * (max(ends) - min(ends))
    return min(ends) - slack, max(ends) + slack


def is_gripper(dimension: Dimension) -> bool:
    return "grip" in dimension.name.lower()


def law_jumps(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """No state jumps: its largest step is at most 20 times that of the median episode and its own usual step."""
    known = [(episode, episode.series[STATE]) for episode in facts if STATE in episode.series]
    widths = {len(series.step) for _, series in known}
    if not known or len(widths) != 1:
        return
    usual = np.median([series.step for _, series in known], axis=0) if len(known) > 2 else np.zeros(widths.pop())
    names = _names(contract, STATE, len(usual))
    for episode, series in known:
        bound = JUMP * np.maximum(series.usual, usual if len(known) > 2 else series.usual)
        for index in np.flatnonzero(
            (series.step > bound) & (series.usual > 0) & ~_grippers(contract, STATE, len(bound))
        ):
            yield _warning(
                "jumps",
                info,
                episode,
                f"{STATE}.{names[index]} jumps by {series.step[index]:.4g} in one row",
                f"steps of about {series.usual[index]:.2g}",
                "look at the row: a lost sample, a wrapped angle or a restarted recording",
                int(series.at[index]),
            )


def law_frozen(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """While the action moves the state does: no half second without a changed digit, few repeated rows."""
    bound = max(8, round(FROZEN_S * info.fps))
    for episode in facts:
        start, length = episode.frozen
        rows = len(episode.motion) + 1
        if length >= bound:
            yield _warning(
                "frozen",
                info,
                episode,
                f"{STATE} stands still for {length} rows while the action moves",
                f"fewer than {bound} rows",
                "the state's source had stopped: leave the episode out, or cut it",
                start,
            )
        elif rows >= 20 and episode.repeated > REPEATED * rows:
            yield _warning(
                "duplicated",
                info,
                episode,
                f"{episode.repeated} of {rows} rows repeat the state of the row before",
                f"at most {REPEATED:.0%}",
                "the state comes slower than fps says: record it at its own rate",
            )


def law_gripper(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """A gripper moves in some episode, or is held as the task demands: the same in all episodes of a task, and not the
    same in all tasks."""
    if contract is None:
        return
    for key, dimensions in ((STATE, contract.state), (ACTION, contract.action)):
        known = [e for e in facts if key in e.series and len(e.series[key].low) == len(dimensions)]
        for index, dimension in enumerate(dimensions):
            if not known or not is_gripper(dimension):
                continue
            if any(e.series[key].low[index] != e.series[key].high[index] for e in known):
                continue
            held: dict[tuple[int, ...], set[float]] = {}
            for episode in known:
                held.setdefault(episode.tasks, set()).add(float(episode.series[key].low[index]))
            by_task = all(len(values) == 1 for values in held.values()) and len(set.union(*held.values())) > 1
            if not by_task:
                yield Finding(
                    "gripper",
                    "meta/info.json",
                    f"{key}.{dimension.name} never moves within any episode",
                    "a gripper that moves, or that every task holds in its own way",
                    "check that the right column was converted",
                    severity="warning",
                )


def law_copies(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """No two episodes hold the same states and actions."""
    seen: dict[str, int] = {}
    for episode in facts:
        if episode.digest in seen:
            yield _warning(
                "copies",
                info,
                episode,
                f"the states and actions of episode {seen[episode.digest]} again",
                "every episode once",
                "leave one of them out with source.episodes",
            )
        elif episode.digest:
            seen[episode.digest] = episode.episode


def law_shift(facts: Sequence[EpisodeSummary], contract: Contract | None, info: Info) -> Iterator[Finding]:
    """Actions are commands, not the recorded states of the same or a later row."""
    known = [episode for episode in facts if episode.digest]
    shifted = [episode.shift for episode in known if episode.shift is not None]
    if shifted and len(shifted) >= 0.9 * len(known):
        shift = max(set(shifted), key=shifted.count)
        where = "of the same row" if shift == 0 else f"of {shift} row{'s' * (shift > 1)} later"
        yield Finding(
            "action shift",
            "meta/info.json",
            f"{ACTION} is {STATE} {where} in {len(shifted)} of {len(known)} episodes",
            "commands that were sent to the robot",
            "fit for policies of positions only: a policy learns to repeat"
            " what it sees; record the leader's or the controller's commands",
            severity="warning",
        )


def _names(contract: Contract | None, key: str, width: int) -> list[str]:
    dimensions = () if contract is None else contract.state if key == STATE else contract.action
    return [d.name for d in dimensions] if len(dimensions) == width else [str(index) for index in range(width)]


def _grippers(contract: Contract | None, key: str, width: int) -> np.ndarray:
    """(width,) bool: grippers may go from end to end in one row."""
    dimensions = () if contract is None else contract.state if key == STATE else contract.action
    if len(dimensions) != width:
        return np.zeros(width, bool)
    return np.array([is_gripper(dimension) for dimension in dimensions])


def _warning(
    check: str, info: Info, episode: EpisodeSummary, found: str, expected: str, cure: str, row: int | None = None
) -> Finding:
    return Finding(check, info.data_file(episode.episode), found, expected, cure, row, "warning")
