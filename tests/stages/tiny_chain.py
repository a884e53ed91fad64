"""Two tiny stages, `first` and `second`, around the real stage runner; what they do is set by the test. No robots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prts_core.config.load import Plan
from prts_core.config.schema import Recipe
from prts_core.files import write_text
from prts_core.manifest import Manifest
from prts_core.stages.base import Parent, Stage, StageContext, StageResult, run_stage


@dataclass(frozen=True)
class Config:
    text: str = "hello"


class Untracked:
    """A run that nobody tracks (MLflow has tests of its own)."""

    def log(self, metrics, step):
        pass

    def finish(self, manifest, result, output):
        pass

    def links(self):
        return {}


@contextmanager
def untracked(*_) -> Iterator[Untracked]:
    yield Untracked()


@dataclass
class Chain:
    """`run("first")` and `run("second")` under one recipe. runs: the stage functions that were really called."""

    outputs: Path
    config: Config = field(default_factory=Config)
    seed: int = 7
    runs: list[str] = field(default_factory=list)
    work: Callable[[StageContext], StageResult | None] = lambda context: None

    @property
    def plan(self) -> Plan:
        return Plan(Path("r.yaml"), Recipe(name="r", datasets=("d",), deploy="d", model="m", seed=self.seed))

    def stage(self, name: str) -> Stage:
        def call(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
            self.runs.append(name)
            result = self.work(context)
            write_text(context.output / "a" / "text.txt", f"{name}: {config.text}\n")
            return result or StageResult(metrics={"n": 1.0})

        parents = [Parent("first", "first", "d")] if name == "second" else []
        return Stage(name, "help", True, lambda plan, _: self.config, lambda plan, _: parents, call)

    def run(self, name: str, partition: str | None = "d") -> Manifest:
        return run_stage(self.stage(name), self.plan, partition, self.outputs)

    def folder(self, name: str) -> Path:
        return self.outputs / "runs" / name / "r" / "d"
