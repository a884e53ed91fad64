"""Pipeline stages: environments in parts that take turns, so that simulators work while the policy is asked.

With two parts, the policy answers for one while the other executes its chunk; neither waits as long as the other's work
takes. A part is a VectorEnv with workers of its own, and does exactly what it would do alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from prts_core.sim.pool import Pool
from prts_core.sim.suite import SuiteSpec
from prts_core.sim.vector import ChunkStep, Observation, VectorEnv, VectorSettings

Ask = Callable[[int, Observation, list[str]], np.ndarray]  # (stage, observation, instructions) -> actions (N, K, A)


class Pipeline:
    """One stage a pool. The initial states of `settings.rank` of `settings.world` are dealt out to the stages, as to so
    many more processes, so that no two walk the same one."""

    def __init__(self, pools: Sequence[Pool], spec: SuiteSpec, settings: VectorSettings) -> None:
        assert pools
        count = len(pools)
        self.stages = [
            VectorEnv(pool, spec, replace(settings, rank=settings.rank * count + at, world=settings.world * count))
            for at, pool in enumerate(pools)
        ]
        self.shown: list[tuple[Observation, list[str]]] = []

    def reset(self) -> list[tuple[Observation, list[str]]]:
        """Begin the next episode everywhere; what each stage shows."""
        self.shown = [stage.reset() for stage in self.stages]
        return self.shown

    def run(self, ask: Ask, chunks: int) -> Generator[tuple[int, ChunkStep]]:
        """(stage, what its chunk did), stages in turn, until each has executed `chunks`; the next call goes on.

        `ask` is called for one stage while the others execute. Where the loop is left early, what is under way is
        waited for and not shown.
        """
        if not self.shown:
            self.reset()
        try:
            for turn in range(chunks + 1):
                for at, stage in enumerate(self.stages):
                    if turn:
                        seen = stage.finish()
                        self.shown[at] = seen.observation, seen.instructions
                    if turn < chunks:
                        stage.start(ask(at, *self.shown[at]))
                    if turn:
                        yield at, seen
        finally:
            for at, stage in enumerate(self.stages):
                if stage.under_way is not None:
                    seen = stage.finish()
                    self.shown[at] = seen.observation, seen.instructions
