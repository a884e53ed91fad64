"""Pipeline stages: environments in parts that take turns, so that simulators work while the policy is asked.

With two parts, the policy answers for one while the other executes its chunk; neither waits as long as the other's work
takes. A part is a VectorEnv with workers of its own, and does exactly what it would do alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count as count_up

import numpy as np

from prts_core.sim.pool import Pool
from prts_core.sim.suite import EpisodeKey, SuiteSpec
from prts_core.sim.vector import ChunkStep, Observation, VectorEnv, VectorSettings

Ask = Callable[[int, Observation, list[str]], np.ndarray]  # (stage, observation, instructions) -> actions (N, K, A)


class Pipeline:
    """One stage a pool. The initial states of `settings.rank` of `settings.world` are dealt out to the stages, as to so
    many more processes, so that no two walk the same one. deal: (stage, environment) -> its next episode, in place of
    that order."""

    def __init__(
        self,
        pools: Sequence[Pool],
        spec: SuiteSpec,
        settings: VectorSettings,
        deal: Callable[[int, int], EpisodeKey | None] | None = None,
    ) -> None:
        assert pools
        count = len(pools)
        self.stages = [
            VectorEnv(
                pool,
                spec,
                replace(settings, rank=settings.rank * count + at, world=settings.world * count),
                None if deal is None else partial(deal, at),
            )
            for at, pool in enumerate(pools)
        ]
        self.shown: list[tuple[Observation, list[str]]] = []

    def reset(self) -> list[tuple[Observation, list[str]]]:
        """Begin the next episode everywhere; what each stage shows."""
        if self.stages[0].beginning is None:
            self.start_reset()
        self.shown = [stage.finish_reset() for stage in self.stages]
        return self.shown

    def start_reset(self) -> None:
        """Have the next episode begin everywhere and return while the simulators are reset; `reset` waits for them."""
        for stage in self.stages:
            stage.start_reset()

    def run(
        self, ask: Ask, chunks: int | None = None, experts: Callable[[int], Sequence[str]] | None = None
    ) -> Generator[tuple[int, ChunkStep]]:
        """(stage, what its chunk did), stages in turn, until each has executed `chunks`; the next call goes on. Without
        a number: until no stage has an episode under way.

        `ask` is called for one stage while the others execute, then `experts` (VectorEnv.start). Where the loop is left
        early, what is under way is waited for and not shown.
        """
        if not self.shown:
            self.reset()
        try:
            for turn in count_up():
                for at, stage in enumerate(self.stages):
                    if stage.under_way is not None:
                        seen = stage.finish()
                        self.shown[at] = seen.observation, seen.instructions
                        yield at, seen
                    if stage.active() if chunks is None else turn < chunks:
                        stage.start(ask(at, *self.shown[at]), None if experts is None else experts(at))
                if all(stage.under_way is None for stage in self.stages):
                    return
        finally:
            for at, stage in enumerate(self.stages):
                if stage.under_way is not None:
                    seen = stage.finish()
                    self.shown[at] = seen.observation, seen.instructions
