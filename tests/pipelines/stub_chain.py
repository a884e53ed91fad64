"""A chain whose stages take milliseconds: the real stage runner, manifests and command line around tiny functions.

Run as a program it is the `prts` command with these stages, for `dvc repro` in tests. Every call of a stage's function
is a line in $PRTS_STUB_CALLS, so that "runs nothing" can be counted across processes.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from prts_core.config.load import source_root
from prts_core.config.schema import LeRobotSource
from prts_core.errors import UnavailableError
from prts_core.files import write_json, write_text
from prts_core.stages import base, chain
from prts_core.stages.base import Stage, StageResult

TASKS = {"faucet-open": {"n": 20, "successes": 19, "expert": 1.0, "blind_replay": 0.1, "max_steps": 84}}
REPORTS = {
    "subtask": {"heldout": {"exact_match": 0.95, "baseline_commonest": 0.4}},
    "benchmark": {
        "success_rate": 0.95,
        "untrained_success_rate": 0.0,
        "blind_replay_success_rate": 0.1,
        "swapped_success_rate": 0.05,
        "black_image_success_rate": 0.2,
        "suite": "metaworld",
        "labels": ["three meshes are stand-ins"],
        "tasks": TASKS,
        "policy_digest": "sha256:stub",
    },
    "value": {"spearman": 0.97, "right_over_wrong": 1.0, "auroc": 0.9, "n_failed": 31, "n_success": 90},
}
RANKING = {
    "verdicts": [
        {
            "episode": 7,
            "instruction": "open the faucet",
            "score": -0.4,
            "flag": {"reason": "reversed", "detail": "falls by 1.42 nats, peers rise by 1.10"},
        },
        {"episode": 3, "instruction": "open the faucet", "score": 0.99, "flag": None},
    ],
    "unsure": {},
}
REGISTRATION = {
    "model_uri": "models:/prts-stub/1",
    "aliases": ["challenger", "champion"],
    "verdict": {"promote": True, "reason": "no champion yet"},
}


def stub(name: str):
    def run(config, inputs, context) -> StageResult:
        with Path(os.environ["PRTS_STUB_CALLS"]).open("a") as calls:
            calls.write(f"{name} {context.partition or '-'}\n")
        source = getattr(config, "source", None)
        if name == "collect" and isinstance(source, LeRobotSource) and not source_root(source).is_dir():
            raise UnavailableError("The dataset's folder is absent", field=config.dataset, cure="set PRTS_SHARED")
        if os.environ.get("PRTS_STUB_BREAK") == name:
            raise ValueError("a bug in the stage's code")
        write_text(context.output / "data" / "content.txt", f"{name} {context.partition} {sorted(inputs)} {config}\n")
        if name in REPORTS:
            write_json(context.output / "report.json", REPORTS[name])
        if name == "value":
            write_json(context.output / "ranking.json", RANKING)
        if name == "register":
            write_json(context.output / "registration.json", REGISTRATION)
        artifacts: tuple[str, ...] = ()
        if name == "sft":
            from PIL import Image

            Image.new("RGB", (1200, 400), (20, 90, 160)).save(context.output / "loss.png")
            write_text(context.output / "training.csv", "step,loss\n0,2.0\n1,1.5\n")
            artifacts = ("training.csv", "loss.png")
        return StageResult(metrics={"rows": 3.0}, contracts={"dataset": "sha256:c"}, artifacts=artifacts)

    return run


def stubbed(stage: Stage) -> Stage:
    return replace(stage, run=stub(stage.name))


def main() -> int:
    from tests.stages.tiny_chain import untracked

    base.stage_run = untracked
    chain.STAGES.update({name: stubbed(stage) for name, stage in chain.STAGES.items()})
    from prts_core.cli.main import main as prts

    return prts()


if __name__ == "__main__":
    sys.exit(main())
