"""Divide simulators, stages, groups and episodes among the rollout processes of a placement, or refuse.

A rollout process asks simulators of its own, which run on its node: those of the env processes that it is paired with.
Its simulators fall into stages that take turns (sim/pipeline.py), a stage's into groups of one initial state each
(algorithm.group_size). Whatever would be cut short is refused here, where RLinf's own stage check never fires:
(n % workers) % stages is 0 for every n that workers divide.
"""

from __future__ import annotations

from dataclasses import dataclass

from prts_core.io.errors import ConfigError
from prts_core.rl.processes.placement import Placement, Process


@dataclass(frozen=True)
class RolloutPlace:
    """One rollout process. accelerators: numbers on its node; empty: it computes on the CPU. env: ranks of the env
    processes whose simulators it has. simulators: how many, in all its stages."""

    rank: int
    node: int
    accelerators: tuple[int, ...]
    env: tuple[int, ...]
    simulators: int


def rollout_places(
    placement: Placement, *, simulators: int, stages: int = 1, group_size: int = 1, episodes: int | None = None
) -> tuple[RolloutPlace, ...]:
    """Every rollout process, with its share of `simulators` (in all processes together).

    episodes: an iteration. ConfigError where env and rollout processes do not pair, simulators do not divide over
    processes or stages, a stage would split a group, or simulators would run different numbers of episodes.
    """
    env, rollout = placement.components["env"], placement.components["rollout"]
    pairs = _pairs(env, rollout)
    unit = len(pairs) * stages * group_size  # what simulators must be a multiple of
    _divides(
        "Simulators do not divide over processes",
        "workers",
        simulators,
        len(pairs),
        f"{simulators} simulators for {len(env)} env and {len(rollout)} rollout processes",
        unit,
    )
    each = simulators // len(pairs)
    _divides(
        "Simulators do not divide into stages",
        "stages",
        each,
        stages,
        f"{stages} stages of {each} simulators a process",
        unit,
    )
    _divides(
        "A group of episodes would be split",
        "algorithm.group_size",
        each // stages,
        group_size,
        f"groups of {group_size} in stages of {each // stages} simulators ({each} a process, {stages} stages)",
        unit,
    )
    if episodes is not None and episodes % simulators:
        raise ConfigError(
            "Episodes do not divide over simulators",
            field="episodes",
            found=f"{episodes} episodes, {simulators} simulators",
            expected="a whole number of episodes for every simulator",
            cure=f"set episodes to a multiple of {simulators}, such as {-(-episodes // simulators) * simulators}",
        )
    return tuple(
        RolloutPlace(
            process.rank,
            process.node,
            process.local,
            tuple(sorted({one.rank for one, other in pairs if other.rank == process.rank})),
            each * sum(other.rank == process.rank for _, other in pairs),
        )
        for process in rollout
    )


def _pairs(env: tuple[Process, ...], rollout: tuple[Process, ...]) -> list[tuple[Process, Process]]:
    """(env, rollout) processes that work together: of the fewer each with equally many of the others, in order."""
    many = max(len(env), len(rollout))
    if many % len(env) or many % len(rollout):
        raise ConfigError(
            "Env and rollout processes do not pair",
            field="placement.components",
            found=f"{len(env)} env and {len(rollout)} rollout processes",
            expected="as many of one as of the other, or a whole multiple of it",
        )
    pairs = [(env[at * len(env) // many], rollout[at * len(rollout) // many]) for at in range(many)]
    for one, other in pairs:
        if one.node != other.node:
            raise ConfigError(
                "Simulators run beside the policy that acts in them",
                field="placement.components",
                found=f"env process {one.rank} on node {one.node}, rollout process {other.rank} on node {other.node}",
                expected="both on one node",
                cure="place them under one key, `env,rollout`",
            )
    return pairs


def _divides(problem: str, field: str, whole: int, part: int, found: str, unit: int) -> None:
    if part < 1 or whole % part or not whole:
        raise ConfigError(
            problem,
            field=field,
            found=found,
            expected=f"{max(part, 1)} or a multiple of it",
            cure=f"set workers to a multiple of {unit}" if unit > 0 else None,
        )
