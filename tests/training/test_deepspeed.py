"""Two processes under ZeRO compute what one computes on the joint batch, and read each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError, MissingExtraError
from prts_core.training import deepspeed as ours
from prts_core.training.checkpoint import load_part, newest
from tests.training.deepspeed_driver import train

HERE = Path(__file__).parent
SAME = (
    "loss",
    "cross_entropy_loss",
    "flow_loss",
    "crl_loss",
    "action_accuracy",
    "crl_scale",
    "grad_norm",
    "flow_matching/toy",
    "flow_matching/wide",
    "fast/toy",
    "learning_rate",
)
FIRST, LATER = 1e-6, 1e-4  # relative: Adam divides gradients by their size, which makes rounding grow step by step


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in json.loads((folder / "losses.json").read_text())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain: one process. zero1, zero2: two; micro: two, in micro-batches, layers recomputed. zero3 goes on from the
    middle of plain, and again goes on from the middle of zero2 in its own processes. bf16: half precision. killed:
    after kill -9 of process 0 between two checkpoints, which takes the other one down."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "plain", 0)
    train(folder / "plain-bf16", 0, precision="bf16")
    assert launch(folder, "killed,2,die=2").returncode != 0
    assert not (folder / "killed" / "losses.json").exists()
    half = folder / "plain" / "checkpoints" / "checkpoint-2"
    jobs = [
        "killed,2",
        "zero1,1",
        "zero2,2",
        f"zero3,3,from={half}",
        "bf16,2,precision=bf16",
        f"again,2,from={folder / 'zero2' / 'checkpoints' / 'checkpoint-2'}",
        "micro,2,accumulate=2,activation_checkpointing=true",
    ]
    done = launch(folder, *jobs)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


def launch(folder: Path, *jobs: str) -> subprocess.CompletedProcess[str]:
    """The driver's jobs on two processes."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(HERE / "deepspeed_driver.py"),
            str(folder),
            *jobs,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("run", "steps"), [("zero1", {0, 1, 2, 3}), ("zero2", {0, 1, 2, 3}), ("zero3", {2, 3})])
def test_the_loss_is_that_of_the_joint_batch(runs: Path, run: str, steps: set[int]) -> None:
    plain, split = losses(runs / "plain"), losses(runs / run)
    assert split.keys() == steps
    for step in steps:
        for name in SAME:
            near = LATER if step > min(steps) else 1e-5 if name == "grad_norm" else FIRST
            assert split[step][name] == pytest.approx(plain[step][name], rel=near, abs=near), (step, name)


def goes_on_as_zero2(runs: Path, name: str) -> None:
    """Steps 2 and 3 of a resumed run are those of the run that was not stopped."""
    straight, resumed = losses(runs / "zero2"), losses(runs / name)
    assert resumed.keys() == {2, 3}
    for step, row in resumed.items():
        for metric in SAME:
            assert row[metric] == pytest.approx(straight[step][metric], rel=1e-6, abs=1e-6), (step, metric)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_resumed_processes_go_on_as_two_that_were_not_stopped(runs: Path) -> None:
    goes_on_as_zero2(runs, "again")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_killed_processes_go_on_to_the_same_curve(runs: Path) -> None:
    goes_on_as_zero2(runs, "killed")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_that_is_told_to_stop_stops_both_at_one_step_and_the_weights_do_not_show_it(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    job = "2,steps=8,checkpoint_every=100,dropout=0.3"
    stopped = launch(tmp_path, f"straight,{job}", f"stopped,{job},term=2")
    assert stopped.returncode != 0
    assert stopped.stderr.count("Stopped on request after step 5 of 8") >= 2, stopped.stderr[-6000:]
    assert newest(tmp_path / "stopped/checkpoints") == tmp_path / "stopped/checkpoints/checkpoint-5"
    done = launch(tmp_path, f"stopped,{job}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert losses(tmp_path / "stopped").keys() == {5, 6, 7}
    straight, resumed = (
        load_part(tmp_path / run / "checkpoints/checkpoint-8", "model") for run in ("straight", "stopped")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_micro_batches_and_recomputation_train_under_zero(runs: Path) -> None:
    plain, micro = losses(runs / "plain"), losses(runs / "micro")
    for name in ("cross_entropy_loss", "flow_loss", "action_accuracy"):  # contrastive negatives are fewer, by design
        assert micro[0][name] == pytest.approx(plain[0][name], rel=FIRST), name
    assert micro[3]["loss"] < micro[0]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bf16_comes_near_the_plain_run_in_bf16(runs: Path) -> None:
    plain, split = losses(runs / "plain-bf16"), losses(runs / "bf16")
    for step in range(4):
        assert split[step]["loss"] == pytest.approx(plain[step]["loss"], rel=0.03), step
    ema = load_file(runs / "bf16" / "average.safetensors")
    assert all(v.dtype == torch.float32 for v in ema.values()), "master weights are exported"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["model", "average", "optimizer"])
@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3"])
def test_checkpoints_are_those_of_one_process(runs: Path, run: str, part: str) -> None:
    plain, split = (load_part(runs / each / "checkpoints" / "checkpoint-4", part) for each in ("plain", run))
    assert plain.keys() == split.keys()
    for key, value in plain.items():
        assert split[key].shape == value.shape and split[key].dtype == value.dtype, key
        # Adam's first steps divide gradients by their own size: rounding of a gradient near 0 moves a weight by much.
        far = (split[key] - value).abs() > 1e-4 + 1e-3 * value.abs()
        assert far.float().mean() < 0.01, key


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_goes_on_where_two_stopped(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, 0, runs / "zero2" / "checkpoints" / "checkpoint-2")
    plain, resumed = losses(runs / "plain"), losses(tmp_path)
    assert resumed.keys() == {2, 3}
    for step, row in resumed.items():
        assert row["loss"] == pytest.approx(plain[step]["loss"], rel=5e-4), step


def test_the_configuration_is_deepspeeds_own_with_the_public_settings() -> None:
    config = TrainConfig(batch_size=64, deepspeed_stage=2, clip_norm=0.5, precision="bf16", accumulate=2)
    made = ours.deepspeed_config(config, world=8)
    assert made["train_batch_size"] == 64 and made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2
    zero = made["zero_optimization"]
    assert zero["stage"] == 2 and made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"]
    assert zero["contiguous_gradients"] and zero["sub_group_size"] == 10**9 and zero["reduce_bucket_size"] == 5 * 10**8
    one = ours.deepspeed_config(TrainConfig(batch_size=64, deepspeed_stage=1), world=8)["zero_optimization"]
    assert one["reduce_bucket_size"] == one["allgather_bucket_size"] == 5 * 10**8
    json.dumps(made)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (TrainConfig(deepspeed_stage=0), "train.deepspeed_stage"),
        (TrainConfig(deepspeed_stage=2, batch_size=9), "train.batch_size"),
        (TrainConfig(deepspeed_stage=2, batch_size=6, accumulate=2), "train.batch_size"),
    ],
)
def test_what_cannot_run_is_refused(config: TrainConfig, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ours.deepspeed_config(config, world=2)
    assert caught.value.field == field


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"\.\[train\]"):
        ours.DeepSpeedTrainer(torch.nn.Linear(1, 1), lambda step: None, TrainConfig(deepspeed_stage=2), 0)  # type: ignore
