"""A chain whose stages take milliseconds: the real store, command line and keys around tiny functions.

Run as a program it is the `prts` command with these stages, for `dvc repro` in tests. Every call of a stage's function
is a line in $PRTS_STUB_CALLS, so that "runs nothing" can be counted across processes.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prts_core.config.identity import identity
from prts_core.config.load import RunPlan
from prts_core.data.validation.report import ValidationReport
from prts_core.io.errors import Stopped
from prts_core.io.files import digest_value, write_json, write_text
from prts_core.launch.signals import graceful
from prts_core.stages import chain, declarations
from prts_core.store.run_stage import untracked
from prts_core.store.stage import Stage, StageResult
from prts_core.tracking import runs

VERSIONS = Path("prts_core/stages/versions.py")  # of the working copy, in the current folder

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
FIGURES = {
    "sft": {"loss": 0.25},
    "subtask": {"exact_match": 0.95, "loss": 0.5},
    "rl": {"success_rate": 0.97, "loss": 0.1},
    "benchmark": {"success_rate": 0.95, "blind_replay_success_rate": 0.1, "success/faucet-open": 0.95},
    "value": {"spearman": 0.97, "auroc": 0.9},
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
    "model_name": "prts-stub",
    "model_uri": "models:/prts-stub/1",
    "aliases": ["challenger", "champion"],
    "verdict": {"promote": True, "reason": "no champion yet"},
}


INFO = {
    "total_frames": 40,
    "total_episodes": 2,
    "fps": 20,
    "features": {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "gripper"]},
        "observation.images.top": {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]},
    },
}


def slow_stages() -> list[str]:
    """Stages that $PRTS_STUB_CALLS.slow names: a file, so that a test can change it under running servers."""
    path = Path(os.environ["PRTS_STUB_CALLS"] + ".slow")
    return path.read_text().split() if path.exists() else []


def work_slowly(checkpoint: Path, seconds: float = 600.0) -> None:
    """Train for ten minutes, with a checkpoint after the first step; a stop request leaves another one."""
    write_text(checkpoint, "step 1\n")
    with graceful() as stop:
        for _ in range(int(seconds * 10)):
            if stop():
                write_text(checkpoint, "on request\n")
                raise Stopped("Training stopped on request", cure="the same again goes on")
            time.sleep(0.1)


def called(name: str) -> None:
    with Path(os.environ["PRTS_STUB_CALLS"]).open("a") as calls:
        calls.write(f"{name}\n")


def stub(name: str):
    """A stage's function: its output says what the stage was asked and what it was given, by content.

    $PRTS_STUB_BREAK names a stage that fails, $PRTS_STUB_INTERRUPT one that leaves a checkpoint and is interrupted.
    """

    def run(config: Any, inputs: dict[str, Any], context: Any) -> StageResult:
        called(f"{name} {context.partition or '-'}")
        if os.environ.get("PRTS_STUB_BREAK") == name:
            raise ValueError("a bug in the stage's code")
        checkpoint = context.work / "checkpoint.txt"
        if os.environ.get("PRTS_STUB_INTERRUPT") == name:
            write_text(checkpoint, "half of the work\n")
            raise KeyboardInterrupt
        if checkpoint.exists():
            called(f"{name} resumed")
        elif name in slow_stages():
            work_slowly(checkpoint)
        given = {role: manifest.content_digest for role, manifest in inputs.items()}
        seed = context.seed if declarations.STAGES[name].seeded else None
        about = [name, declarations.STAGES[name].version, identity(config), given, seed]
        write_text(context.output / "data" / "content.txt", f"{name} {context.partition} {digest_value(about)}\n")
        if name in REPORTS:
            write_json(context.output / "report.json", REPORTS[name])
        if name == "convert":
            write_json(context.output / "meta" / "info.json", INFO)
        if name == "validate":
            ValidationReport(str(context.partition)).save(context.output)
        if name == "value":
            write_json(context.output / "ranking.json", RANKING)
        artifacts: tuple[str, ...] = ()
        if name == "sft":
            from PIL import Image

            Image.new("RGB", (1200, 400), (20, 90, 160)).save(context.output / "loss.png")
            write_text(context.output / "training.csv", "step,loss\n0,2.0\n1,1.5\n")
            artifacts = ("training.csv", "loss.png")
        return StageResult({"rows": 3.0} | FIGURES.get(name, {}), {"dataset": "sha256:c"}, artifacts)

    return run


def stub_register(plan: RunPlan, outputs: Path, caller: dict[str, str] | None = None) -> dict[str, Any]:
    """What `chain.register` leaves behind, without a registry."""
    called("register -")
    digest = chain.finished("package", plan, None, outputs).content_digest
    made = REGISTRATION | {"package_digest": digest, "content_digest": digest}
    write_json(outputs / "registrations" / f"{plan.recipe.name}.json", made)
    return made


def stubbed(stage: Stage) -> Stage:
    return replace(stage, run=stub(stage.name))


def stubbed_stages() -> dict[str, Stage]:
    """The chain with stubs, of the behaviour versions that the working copy in the current folder says."""
    versions: dict[str, Any] = {}
    if VERSIONS.exists():
        exec(VERSIONS.read_text(), versions)
    known = versions.get("VERSIONS", {})
    return {
        name: replace(stubbed(stage), version=known.get(name, stage.version))
        for name, stage in declarations.STAGES.items()
    }


def main() -> int:
    if "PRTS_STUB_TRACKED" not in os.environ:
        runs.stage_run = untracked
    declarations.STAGES.update(stubbed_stages())
    from prts_core.cli.main import main as prts

    return prts()


if __name__ == "__main__":
    sys.exit(main())
