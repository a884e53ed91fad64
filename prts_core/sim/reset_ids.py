"""Which initial state each group of environments starts its n-th episode from.

A reset id numbers every (task, initial state) of a suite, tasks one after another. The id of an episode depends on the
group and on how many episodes the group has begun, never on which environment was quicker: the members of a group walk
one sequence, so that they can be compared, and two runs walk the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prts_core.io.errors import ConfigError, lookup
from prts_core.sim.suite import EpisodeKey, SuiteSpec
from prts_core.sim.suites import task_of

Order = Literal["training", "evaluation"]
EXHAUSTED = -1


@dataclass(frozen=True)
class ResetIds:
    """`ids[i]`: what the shard of `rank` walks through, group by group. `endless`: it begins again at its end.

    fixed: a group keeps the id of its first episode.
    """

    spec: SuiteSpec
    tasks: tuple[str, ...]
    trials: tuple[int, ...]
    ids: np.ndarray
    groups: int
    endless: bool
    fixed: bool

    def __call__(self, group: int, episode: int) -> int:
        """The reset id of that group's n-th episode (from 0), EXHAUSTED when there is none left."""
        at = group if self.fixed else episode * self.groups + group
        if not self.endless and at >= len(self.ids):
            return EXHAUSTED
        return int(self.ids[at % len(self.ids)])

    def key(self, reset_id: int, seed: int) -> EpisodeKey:
        """Task and initial state of an id: the ids of a task follow each other."""
        ends = np.cumsum(self.trials)
        task = int(np.searchsorted(ends, reset_id, side="right"))
        return EpisodeKey(self.spec.name, self.tasks[task], int(reset_id - ends[task] + self.trials[task]), seed)


def reset_ids(
    spec: SuiteSpec,
    groups: int,
    *,
    order: Order = "training",
    fixed: bool = False,
    tasks: Sequence[str] = (),
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> ResetIds:
    """The ids of one of `world` processes.

    "training": all ids shuffled by `seed`, dealt out to the processes, walked without end. "evaluation": initial state
    0 of every task, then 1, ..., dealt out likewise, each once. A suite whose resets are drawn from a seed has as many
    initial states a task as its protocol has episodes. tasks: only these.
    """
    chosen = [task_of(spec, name) for name in tasks] or list(spec.tasks)
    trials = [task.initial_states or spec.episodes_per_task for task in chosen]
    firsts = np.cumsum([0, *trials[:-1]])
    lookup({"training": 0, "evaluation": 1}, order, "order of initial states")
    if order == "training":
        ids = np.random.default_rng(seed).permutation(sum(trials))
    else:
        ids = np.asarray(
            [first + n for n in range(max(trials)) for first, count in zip(firsts, trials, strict=True) if n < count]
        )
    mine = ids[rank::world]
    if not len(mine):
        raise ConfigError(
            "There are more processes than initial states", field="world", found=world, expected=f"at most {len(ids)}"
        )
    return ResetIds(
        spec,
        tuple(task.name for task in chosen),
        tuple(trials),
        mine,
        groups,
        endless=order == "training" or fixed,
        fixed=fixed,
    )
