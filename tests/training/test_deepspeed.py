"""Two processes under ZeRO compute what one computes on the joint batch, and read each other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_driver import train
from safetensors.torch import load_file

from prts_core.errors import ConfigError, MissingExtraError
from prts_core.training import deepspeed as ours
from prts_core.training.config import TrainConfig

HERE = Path(__file__).parent
LOSSES = ("loss", "cross_entropy_loss", "flow_loss", "crl_loss")


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in json.loads((folder / "losses.json").read_text())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain (one process), zero2 (two processes), and zero3-resumed (two processes, from the plain run's middle)."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "plain", 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    jobs = ["2", f"3:{folder / 'plain' / 'half.safetensors'}"]
    done = subprocess.run(
        [*command, str(HERE / "deepspeed_driver.py"), str(folder), *jobs],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("run", "steps"), [("zero2", {0, 1, 2, 3}), ("zero3-resumed", {2, 3})])
def test_the_loss_is_that_of_the_joint_batch(runs: Path, run: str, steps: set[int]) -> None:
    plain, split = losses(runs / "plain"), losses(runs / run)
    assert split.keys() == steps
    for step in steps:
        for name in (*LOSSES, "action_accuracy", "crl_scale", "grad_norm"):
            assert split[step][name] == pytest.approx(plain[step][name], rel=2e-4), (step, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["average", "checkpoint"])
@pytest.mark.parametrize("run", ["zero2", "zero3-resumed"])
def test_averaged_weights_and_checkpoints_are_those_of_one_process(runs: Path, run: str, name: str) -> None:
    plain, split = (load_file(runs / each / f"{name}.safetensors") for each in ("plain", run))
    assert plain.keys() == split.keys()
    for key, value in plain.items():
        assert split[key].shape == value.shape and split[key].dtype == value.dtype, key
        # Adam's first steps divide gradients by their own size: rounding of a gradient near 0 moves a weight by much.
        far = (split[key] - value).abs() > 1e-4 + 1e-3 * value.abs()
        assert far.float().mean() < 0.01, key


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_goes_on_where_two_stopped(runs: Path, tmp_path: Path) -> None:
    train(tmp_path, 0, runs / "zero2" / "half.safetensors")
    plain, resumed = losses(runs / "plain"), losses(tmp_path)
    assert resumed.keys() == {2, 3}
    for step, row in resumed.items():
        assert row["loss"] == pytest.approx(plain[step]["loss"], rel=5e-4), step


def test_the_configuration_is_deepspeeds_own() -> None:
    made = ours.deepspeed_config(TrainConfig(batch_size=64, deepspeed_stage=2, clip_norm=0.5), world=8, bf16=True)
    assert made["train_batch_size"] == 64 and made["train_micro_batch_size_per_gpu"] == 8
    assert made["zero_optimization"]["stage"] == 2 and made["gradient_clipping"] == 0.5 and made["bf16"]["enabled"]
    json.dumps(made)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (TrainConfig(deepspeed_stage=4), "train.deepspeed_stage"),
        (TrainConfig(deepspeed_stage=0), "train.deepspeed_stage"),
        (TrainConfig(deepspeed_stage=2, batch_size=9), "train.batch_size"),
    ],
)
def test_what_cannot_run_is_refused(config: TrainConfig, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ours.deepspeed_config(config, world=2)
    assert caught.value.field == field


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"prts\[train\]"):
        ours.DeepSpeedTrainer(torch.nn.Linear(1, 1), lambda step: None, TrainConfig(deepspeed_stage=2), 0)  # type: ignore
