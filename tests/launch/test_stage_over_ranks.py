"""A stage that trains, over two processes: theirs of torchrun, and ours of a launch. One process keeps the books, both
train, and the result is that of one process."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.config.load import load_plan
from prts_core.io.errors import StageError
from prts_core.launch.where import parse_launch
from prts_core.stages import chain, declarations
from prts_core.stages.elsewhere import executor, order, perform
from prts_core.store.run_stage import untracked
from prts_core.store.stage import StageContext
from tests.data.conftest import convert_toy, write_raw

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
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# The engine cannot change a result and is no part of its key: another outputs folder keeps the two apart.
SPLIT = ("--set", "sft.train.engine=zero2")


def prts(folder: Path, outputs: str, *command: str, launch: str = "inline", before: tuple[str, ...] = ()):
    return [
        sys.executable,
        *before,
        "-m",
        "prts_core.cli.main",
        *command,
        "--config",
        str(folder / "r.yaml"),
        "--outputs",
        str(folder / outputs),
    ], os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PRTS_LAUNCH": launch}


def run(folder: Path, outputs: str, *command: str, **how) -> subprocess.CompletedProcess[str]:
    line, env = prts(folder, outputs, *command, **how)
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with everything before sft made, in `outputs` and, by links, in `torchrun` and `launched`."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("prts_core.tracking.runs.stage_run", untracked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    made = convert_toy(tmp_path, write_raw(tmp_path / "raw"))
    monkeypatch.setenv("TOY_ROOT", str(made.root))
    for name in ("datasets", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "datasets/toy.yaml").write_text(DATASET)
    shutil.copy(ROOT / "configs/models/smoke.yaml", tmp_path / "models/m.yaml")
    plan = load_plan(tmp_path / "r.yaml")
    for stage in ("collect", "convert", "validate", "stats"):
        chain.run(stage, plan, "toy", tmp_path / "outputs")
    chain.run("pretrain", plan, None, tmp_path / "outputs")
    for copy in ("torchrun", "launched"):
        shutil.copytree(tmp_path / "outputs", tmp_path / copy)
    return tmp_path


def output_of(folder: Path, outputs: str) -> Path:
    (entry,) = (folder / outputs / "store/sft").glob("*/manifest.json")
    return entry.with_name("output")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_make_the_stage_of_one(folder: Path) -> None:
    chain.run("sft", load_plan(folder / "r.yaml"), "toy", folder / "outputs")
    plain = output_of(folder, "outputs")
    theirs = run(folder, "torchrun", "sft", *SPLIT, before=TORCHRUN)
    ours = run(folder, "launched", "sft", *SPLIT, launch="torchrun:2")
    for done, outputs in ((theirs, "torchrun"), (ours, "launched")):
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
        assert done.stdout.count("trainable") == 1, "the second process says nothing"
        same(plain, output_of(folder, outputs))
    assert output_of(folder, "torchrun").parent.name == output_of(folder, "launched").parent.name
    made = output_of(folder, "torchrun").with_name("provenance.json")
    before = made.stat().st_mtime_ns
    again = run(folder, "torchrun", "sft", *SPLIT, before=TORCHRUN)
    assert again.returncode == 0 and made.stat().st_mtime_ns == before, "nothing runs twice"


def same(plain: Path, split: Path) -> None:
    assert {p.relative_to(split) for p in split.rglob("*")} == {p.relative_to(plain) for p in plain.rglob("*")}
    one, two = rows(plain), rows(split)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "flow_loss", "crl_loss"):
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4), (a["step"], name)
    assert float(two[0]["loss"]) == pytest.approx(float(one[0]["loss"]), rel=2e-6)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "training.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_launch_goes_on_to_the_weights_of_one_that_was_not(folder: Path) -> None:
    long = ("--set", "sft.train.steps=22", "--set", "sft.train.checkpoint_every=1000")
    straight = run(folder, "torchrun", "sft", *SPLIT, *long, launch="torchrun:2")
    assert straight.returncode == 0, straight.stderr[-6000:]
    line, env = prts(folder, "launched", "sft", *SPLIT, *long, launch="torchrun:2")
    with subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as job:
        while not (curves := list((folder / "launched/store/sft").glob("*/work/curve.jsonl"))):
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        _, said = job.communicate(timeout=240)
    assert job.returncode == 75 and "Stopped on request after step" in said, said
    (left,) = (curves[0].parent / "checkpoints").iterdir()
    made = len(curves[0].read_text().splitlines())
    assert left.name == f"checkpoint-{made}" and made % 5 == 0 and made < 22
    again = run(folder, "launched", "sft", *SPLIT, *long, launch="torchrun:2")
    assert again.returncode == 0, again.stderr[-6000:]
    one, two = (
        json.loads(output_of(folder, name).with_name("manifest.json").read_text()) for name in ("torchrun", "launched")
    )
    assert one["content_digest"] == two["content_digest"]


def test_torchrun_is_for_stages_that_train() -> None:
    seen: list[str] = []
    stage = replace(declarations.STAGES["stats"], run=lambda *given: seen.append("here"))  # type: ignore[func-returns-value]
    executor(parse_launch("torchrun:2"), None)(stage, None, {}, None)  # type: ignore[arg-type]
    assert seen == ["here"]


def test_a_recipe_that_changes_while_its_stage_starts_is_refused(tmp_path: Path) -> None:
    plan = load_plan(ROOT / "configs/smoke.yaml")
    config = declarations.STAGES["pretrain"].config(plan, None)
    context = StageContext(tmp_path, tmp_path / "work", plan.recipe.seed, "smoke", None)
    told = order(declarations.STAGES["pretrain"], plan, config, {}, context)
    changed = replace(config, train=replace(config.train, steps=1))
    other = order(declarations.STAGES["pretrain"], plan, changed, {}, context)
    assert json.loads(json.dumps(told)) == {**told, "overrides": []} and told["digest"] != other["digest"]
    with pytest.raises(StageError, match=r"changed while its stage was starting.*prts pretrain"):
        perform(lambda metrics, step: None, **other)
