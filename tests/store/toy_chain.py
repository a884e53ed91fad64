"""Two tiny stages, `first` and `second`, around the real stage runner; what they do is set by the test. No robots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prts_core.config.identity import execution
from prts_core.config.load import RunPlan
from prts_core.config.schema import DatasetConfig, Recipe
from prts_core.config.sources import LeRobotSource
from prts_core.io.files import write_text
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import Store
from prts_core.store.stage import Parent, Read, Stage, StageContext, StageResult
from prts_core.store.views import view_folder


@dataclass(frozen=True)
class Config:
    text: str = "hello"
    workers: int = execution(1)


class ToyPlan(RunPlan):
    """A plan whose one dataset `d` lies in `source`, so that no YAML is read."""

    source: Path | None = None
    optional: bool = False

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        return {"d": DatasetConfig("d", LeRobotSource("lerobot", root=str(self.source)), optional=self.optional)}


@dataclass
class Chain:
    """`run("first")` and `run("second")` under one recipe. runs: the stage functions that were really called.

    config is that of `first`; `second` has one of its own. source: a folder that `first` depends on. reads: what else
    `second` reads from outside.
    """

    outputs: Path
    config: Config = field(default_factory=Config)
    second: Config = field(default_factory=Config)
    seed: int = 7
    version: int = 1
    recipe: str = "r"
    overrides: tuple[str, ...] = ()
    source: Path | None = None
    optional: bool = False
    reads: dict[str, Read | str] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    work: Callable[[StageContext], StageResult | None] = lambda context: None

    @property
    def plan(self) -> RunPlan:
        recipe = Recipe(name=self.recipe, datasets=("d",), deploy="d", model="m", seed=self.seed)
        plan = ToyPlan(Path(f"{self.recipe}.yaml"), recipe, self.overrides)
        plan.source, plan.optional = self.source, self.optional
        return plan

    @property
    def store(self) -> Store:
        return Store(self.outputs, {name: self.stage(name) for name in ("first", "second")})

    def stage(self, name: str) -> Stage:
        chosen = self.config if name == "first" else self.second

        def call(config: Config, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
            self.runs.append(name)
            result = self.work(context)
            read = "".join((m.folder(context.outputs) / "a" / "text.txt").read_text() for m in inputs.values())
            write_text(context.output / "a" / "text.txt", f"{read}{name}: {config.text}\n")
            return result or StageResult(metrics={"n": 1.0})

        parents = [Parent("first", "first", "d")] if name == "second" else []
        return Stage(
            name,
            "help",
            self.version if name == "first" else 1,
            True,
            lambda plan, _: chosen,
            lambda plan, _: parents,
            call,
            seeded=name == "first",
            external=name == "first" and self.source is not None,
            headline=("n",),
            reads=lambda plan, _: self.reads if name == "second" else {},
        )

    def run(self, name: str) -> Manifest:
        return self.store.run(name, self.plan)

    def find(self, name: str) -> Manifest | None:
        """The finished result under the present plan; nothing is run."""
        store, plan = self.store, self.plan
        return store.find(store.resolve(name, plan), plan)

    def folder(self, name: str) -> Path:
        """Where the result of the present plan lies in the store."""
        store = self.store
        return store.folder(store.resolve(name, self.plan))

    def view(self, name: str) -> Path:
        return view_folder(self.outputs, self.recipe, name, "d")

    def text(self, name: str) -> str:
        return (self.folder(name) / "output" / "a" / "text.txt").read_text()

    def damage(self, name: str, text: str = "vandal") -> Path:
        """Write over a file of a finished result, as a careless person would."""
        path = self.folder(name) / "output" / "a" / "text.txt"
        path.chmod(0o644)
        path.write_text(text)
        return path
