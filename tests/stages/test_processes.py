"""A stage under `torchrun`: one process keeps the books, both train, and the result is that of one process."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prts_core.config.load import load_plan
from prts_core.errors import ConfigError
from prts_core.stages import base, chain
from prts_core.stages.processes import run_stage_together
from tests.data.conftest import convert_toy, write_raw
from tests.stages.tiny_chain import untracked

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "{steps: 3, batch_size: 4, warmup_steps: 1, checkpoint_every: 2, log_every: 1, threads: 1, eval_every: 2"
RECIPE = f"""\
name: r
datasets: [toy]
deploy: toy
model: m
pretrain:
  vocab_size: 400
  fast_vocab_size: 200
  train: {TRAIN}}}
sft:
  train: {TRAIN}, early_fraction: 0.4, weights: {{fast: 0.0, flow: 1.0, contrastive: 0.1}}}}
"""
DATASET = 'name: toy\nsource: {kind: lerobot, root: "${TOY_ROOT}", heldout_episodes: 2}\n'


def together(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         "prts_core.cli.main", *command, "--config", str(folder / "r.yaml"), "--outputs", str(folder / "outputs")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_make_the_stage_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(base, "stage_run", untracked)
    made = convert_toy(tmp_path, write_raw(tmp_path / "raw"))
    monkeypatch.setenv("TOY_ROOT", str(made.root))
    for name in ("datasets", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "datasets/toy.yaml").write_text(DATASET)
    shutil.copy(ROOT / "configs/models/smoke.yaml", tmp_path / "models/m.yaml")
    outputs = tmp_path / "outputs"
    plan = load_plan(tmp_path / "r.yaml")
    for stage in ("collect", "convert", "validate", "stats"):
        chain.run(stage, plan, "toy", outputs)
    chain.run("pretrain", plan, None, outputs)
    chain.run("sft", plan, "toy", outputs)
    output = outputs / "runs/sft/r/toy/output"
    plain, files = rows(output), {p.relative_to(output) for p in output.rglob("*")}

    stage = ("--set", "sft.train.deepspeed_stage=2")
    done = together(tmp_path, "sft", *stage)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    assert done.stdout.count("trainable") == 1, "the second process says nothing"
    split = rows(output)
    assert {p.relative_to(output) for p in output.rglob("*")} == files
    assert len(split) == len(plain) == 3
    for one, two in zip(plain, split, strict=True):
        for name in ("loss", "flow_loss", "crl_loss"):
            assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4), (one["step"], name)
    assert float(split[0]["loss"]) == pytest.approx(float(plain[0]["loss"]), rel=2e-6)

    before = (output.parent / "manifest.json").stat().st_mtime_ns
    again = together(tmp_path, "sft", *stage)
    assert again.returncode == 0 and (output.parent / "manifest.json").stat().st_mtime_ns == before, (
        "nothing runs twice"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="runs in one process"):
        run_stage_together(chain.STAGES["stats"], plan, "toy", outputs)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "training.csv").open() as file:
        return list(csv.DictReader(file))
