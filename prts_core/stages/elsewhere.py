"""Run a stage's function in other processes than the one that keeps its books.

What they are told is plain JSON: which stage of which recipe file, in which work folder, on which parents' results.
They lock, verify and record nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prts_core.config.identity import identity
from prts_core.config.load import RunPlan, load_plan
from prts_core.io.errors import StageError
from prts_core.io.files import digest_value
from prts_core.launch.children import run_elsewhere
from prts_core.launch.together import refuse_many, run_together
from prts_core.launch.where import Launch
from prts_core.stages.declarations import STAGES
from prts_core.store.manifest import MANIFEST, Manifest
from prts_core.store.run_stage import Execute
from prts_core.store.stage import Stage, StageContext, StageResult

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class Order:
    """One execution of a stage as another process is told of it. inputs: role -> manifest. files: of the context.
    digest: of what the recipe said when the order was given."""

    stage: str
    config_file: str
    overrides: tuple[str, ...]
    partition: str | None
    outputs: str
    work: str
    inputs: dict[str, str]
    files: dict[str, str]
    digest: str


def order(
    stage: Stage, plan: RunPlan, config: Any, inputs: dict[str, Manifest], context: StageContext
) -> dict[str, Any]:
    """The order for one execution, as plain JSON."""
    paths = {role: str(m.folder(context.outputs).with_name(MANIFEST)) for role, m in inputs.items()}
    made = Order(
        stage.name,
        str(plan.path),
        plan.overrides,
        context.partition,
        str(context.outputs),
        str(context.work),
        paths,
        context.files,
        _digest(config, context.seed),
    )
    return asdict(made)


def perform(log: Log, **ordered: Any) -> dict[str, Any]:
    """Call the ordered stage's function; its StageResult as plain JSON. StageError where the recipe has changed since
    the order was given."""
    given = Order(**ordered)
    plan = load_plan(Path(given.config_file), given.overrides)
    stage = STAGES[given.stage]
    config = stage.config(plan, given.partition)
    if _digest(config, plan.recipe.seed) != given.digest:
        raise StageError(
            "The recipe, or a file that it names, was changed while its stage was starting",
            file=plan.path,
            cure=f"run `{plan.command(stage.name, given.partition, Path(given.outputs))}` again",
        )
    inputs = {role: Manifest.load(Path(path)) for role, path in given.inputs.items()}
    context = StageContext(
        Path(given.outputs), Path(given.work), plan.recipe.seed, plan.recipe.name, given.partition, log, given.files
    )
    return asdict(stage.run(config, inputs, context))


def executor(launch: Launch, plan: RunPlan) -> Execute:
    """How `Store.run` calls a stage's function. torchrun is for stages that train; the others run inline."""

    def execute(stage: Stage, config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
        if launch.kind == "inline" or (launch.kind == "torchrun" and not stage.trains):
            return stage.run(config, inputs, context)
        told = order(stage, plan, config, inputs, context)
        made = run_elsewhere(launch, context.work, f"{__name__}:perform", told, context.log)
        return StageResult(made["metrics"], made["contracts"], tuple(made["artifacts"]))

    return execute


def run_launched(stage: Stage, plan: RunPlan, run: Callable[[Execute], Manifest]) -> Manifest:
    """`run` a stage over processes that a launcher started (WORLD_SIZE). Those that only help end here, by SystemExit.

    run: `Store.run` with the execute function it is given. ConfigError for a stage that trains nothing.
    """
    refuse_many(stage.name, stage.trains)

    def first(call: Callable[[str], None]) -> Manifest:
        def execute(stage: Stage, config: Any, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
            call(json.dumps(order(stage, plan, config, inputs, context)))
            return stage.run(config, inputs, context)

        return run(execute)

    def follow(text: str) -> None:
        perform(lambda metrics, step: None, **json.loads(text))

    return run_together(first, follow)


def _digest(config: Any, seed: int) -> str:
    return digest_value([identity(config), seed])
