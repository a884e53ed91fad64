"""Toy stages that go through the real stage runner."""

from __future__ import annotations

from dataclasses import dataclass

from prts_core.stages.base import Parent, Stage, StageContext, StageResult


@dataclass(frozen=True)
class ToyConfig:
    rate: float = 0.5
    tasks: tuple[dict, ...] = ({"name": "open", "limit": 3}, {"name": "close", "limit": 4})
    note: str = "x" * 7000


def toy_stage(name: str, run, parents: tuple[str, ...] = ()) -> Stage:
    return Stage(name, name, False, lambda plan, _: ToyConfig(), lambda *_: [Parent(p, p, None) for p in parents], run)


def write_and_report(config: ToyConfig, inputs, context: StageContext) -> StageResult:
    (context.output / "plots").mkdir(exist_ok=True)
    (context.output / "plots" / "curve.txt").write_text("a plot")
    (context.output / "report.json").write_text("{}")
    for step in range(1, 4):
        context.log({"loss/total": 1.0 / step, "lr": 0.1}, step)
    return StageResult({"success_rate": 0.9}, {"policy": "sha256:c0"}, ("report.json", "plots/curve.txt"))
