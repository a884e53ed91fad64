"""Two processes compute what one computes on the joint batch, under every engine, and go on from each other's
checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError, MissingExtraError
from prts_core.training.checkpoint import ShardFiles, newest
from prts_core.training.engines import make_engine
from prts_core.training.engines.zero import deepspeed_config
from prts_core.training.parallel import ParallelContext
from tests.training.engine_driver import train
from tests.training.runs import CONFIG, network, text_tokenizer

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
    "update_ratio/llm",
    "update_ratio/contrastive",
)
SPREAD = ("fsdp", "hsdp", "hsdp4", "zero1", "zero2", "zero3")
FIRST, LATER = 1e-6, 1e-4  # relative: Adam divides gradients by their size, which makes rounding grow step by step


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {row["step"]: row for row in json.loads((folder / "losses.json").read_text())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """single: one process. SPREAD: two, hsdp with a copy of the model in each; hsdp4: four, two copies of two
    parts. <engine>-goes-on: from the middle of another engine's run. <engine>-bf16: half precision.
    <engine>-micro: in micro-batches, layers recomputed. killed: after kill -9 of process 0 between two
    checkpoints, which takes the other one down. again: resumed by itself."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "single", "single")
    train(folder / "single-bf16", "single", precision="bf16")
    train(folder / "single-micro", "single", accumulate=2)
    assert launch(folder, "killed,fsdp,die=2").returncode != 0
    four = launch(folder, "hsdp4,fsdp,fsdp_group=2", processes=4)
    assert four.returncode == 0, four.stdout[-4000:] + four.stderr[-8000:]
    assert not (folder / "killed" / "losses.json").exists()

    def half(run: str) -> Path:
        return folder / run / "checkpoints" / "checkpoint-2"

    jobs = [
        "killed,fsdp",
        "fsdp,fsdp",
        "hsdp,fsdp,fsdp_group=1",
        "zero1,zero1",
        "zero2,zero2",
        "zero3,zero3",
        f"fsdp-goes-on,fsdp,from={half('zero2')}",
        f"zero1-goes-on,zero1,from={half('fsdp')}",
        f"zero3-goes-on,zero3,from={half('single')}",
        f"again,fsdp,from={half('fsdp')}",
        *(f"{engine}-bf16,{engine},precision=bf16" for engine in ("fsdp", "zero2", "zero3")),
        "poisoned,fsdp,poison=true",
        *(f"{e}-micro,{e},accumulate=2,activation_checkpointing=true" for e in ("fsdp", "zero2", "zero3")),
    ]
    done = launch(folder, *jobs)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


def launch(folder: Path, *jobs: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The driver's jobs on so many processes."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            str(HERE / "engine_driver.py"),
            str(folder),
            *jobs,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=580,
    )


def near(found: dict[int, dict[str, float]], meant: dict[int, dict[str, float]], first: float = FIRST) -> None:
    for step, row in found.items():
        for name in SAME:
            tolerance = LATER if step > min(found) else 1e-5 if name == "grad_norm" else first
            assert row[name] == pytest.approx(meant[step][name], rel=tolerance, abs=tolerance), (step, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", SPREAD)
def test_the_loss_is_that_of_the_joint_batch(runs: Path, run: str) -> None:
    split = losses(runs / run)
    assert split.keys() == {0, 1, 2, 3}
    plain = losses(runs / "single")
    near(split, plain)
    if "zero" not in run:  # DeepSpeed tells nothing of gradients by group
        for step in (1, 3):  # of the averaged weights; ZeRO's are of the last ones
            assert split[step]["eval/loss"] == pytest.approx(plain[step]["eval/loss"], rel=LATER), step
        for group in ("llm", "vision", "action", "contrastive"):
            assert split[0][f"grad_norm/{group}"] == pytest.approx(plain[0][f"grad_norm/{group}"], rel=1e-4), group


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", ["fsdp", "zero1", "zero3"])
def test_it_goes_on_from_another_engines_checkpoint(runs: Path, run: str) -> None:
    resumed = losses(runs / f"{run}-goes-on")
    assert resumed.keys() == {2, 3}
    near(resumed, losses(runs / "single"), LATER)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", ["fsdp", "zero3"])
def test_one_process_goes_on_where_two_stopped(runs: Path, run: str, tmp_path: Path) -> None:
    train(tmp_path, "single", runs / run / "checkpoints" / "checkpoint-2")
    resumed = losses(tmp_path)
    assert resumed.keys() == {2, 3}
    near(resumed, losses(runs / "single"), LATER)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", ["again", "killed"])
def test_resumed_processes_go_on_as_those_that_were_not_stopped(runs: Path, run: str) -> None:
    straight, resumed = losses(runs / "fsdp"), losses(runs / run)
    assert resumed.keys() == {2, 3}
    for step, row in resumed.items():
        for metric in SAME:
            assert row[metric] == pytest.approx(straight[step][metric], rel=1e-6, abs=1e-6), (step, metric)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", SPREAD)
def test_weights_and_checkpoints_are_those_of_one_process(runs: Path, run: str) -> None:
    plain, split = (load_file(runs / each / "average.safetensors") for each in ("single", run))
    close(plain, split)
    one, many = (ShardFiles(runs / each / "checkpoints" / "checkpoint-4") for each in ("single", run))
    assert one.runs.keys() == many.runs.keys()
    shapes = {name: (max(end for _, end, _ in found),) for name, found in one.runs.items()}
    close(*({name: files.whole(name, shape) for name, shape in shapes.items()} for files in (one, many)))


def close(plain: dict[str, torch.Tensor], split: dict[str, torch.Tensor]) -> None:
    assert plain.keys() == split.keys()
    for key, value in plain.items():
        assert split[key].shape == value.shape and split[key].dtype == value.dtype == torch.float32, key
        # Adam's first steps divide gradients by their own size: rounding of a gradient near 0 moves a weight by much.
        far = (split[key] - value).abs() > 1e-4 + 1e-3 * value.abs()
        assert far.float().mean() < 0.01, key


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", ["fsdp", "zero2", "zero3"])
def test_micro_batches_and_recomputation_are_the_one_big_batch(runs: Path, run: str) -> None:
    near(losses(runs / f"{run}-micro"), losses(runs / "single-micro"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("run", ["fsdp", "zero2", "zero3"])
def test_bf16_comes_near_one_process_in_bf16(runs: Path, run: str) -> None:
    plain, split = losses(runs / "single-bf16"), losses(runs / f"{run}-bf16")
    for step in range(4):
        assert split[step]["loss"] == pytest.approx(plain[step]["loss"], rel=0.03), step
        assert split[step]["crl_scale"] == pytest.approx(plain[step]["crl_scale"], rel=1e-3), "a float32 temperature"
    first, other = (load_file(runs / each / "average.safetensors") for each in ("single-bf16", f"{run}-bf16"))
    assert all(v.dtype == torch.float32 for v in other.values()), "float32 weights are averaged and exported"
    rounded = [name for name, v in other.items() if v.numel() > 1000 and torch.equal(v, v.bfloat16().float())]
    assert not rounded and first.keys() == other.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_that_is_told_to_stop_stops_both_at_one_step_and_the_weights_do_not_show_it(tmp_path: Path) -> None:
    job = "fsdp,steps=8,checkpoint_every=100,dropout=0.3"
    stopped = launch(tmp_path, f"straight,{job}", f"stopped,{job},term=2")
    assert stopped.returncode != 0
    assert stopped.stderr.count("Stopped on request after step 5 of 8") >= 2, stopped.stderr[-6000:]
    assert newest(tmp_path / "stopped/checkpoints") == tmp_path / "stopped/checkpoints/checkpoint-5"
    done = launch(tmp_path, f"stopped,{job}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert losses(tmp_path / "stopped").keys() == {5, 6, 7}
    straight, resumed = (load_file(tmp_path / run / "average.safetensors") for run in ("straight", "stopped"))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_loss_that_is_no_number_in_one_process_stops_all_and_each_replays_its_part(runs: Path) -> None:
    found = [json.loads((runs / "poisoned" / f"replay-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["file"] for one in found] == ["nan_batch.json", "nan_batch-1.json"]
    assert found[0]["told"] != found[1]["told"], "each process's own share"
    assert [one["loss"] for one in found] == ["nan", "nan"]


# ---- what is refused ---------------------------------------------------------------------------------------------
def test_deepspeeds_configuration_has_the_public_settings() -> None:
    config = TrainConfig(batch_size=64, engine="zero2", clip_norm=0.5, precision="bf16", accumulate=2)
    made = deepspeed_config(config, 2, world=8)
    assert made["train_batch_size"] == 64 and made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2 and made["torch_autocast"]["enabled"]
    zero = made["zero_optimization"]
    assert zero["stage"] == 2 and made["gradient_clipping"] == 0.5
    assert zero["contiguous_gradients"] and zero["sub_group_size"] == 10**9 and zero["reduce_bucket_size"] == 5 * 10**8
    one = deepspeed_config(TrainConfig(batch_size=64, engine="zero1"), 1, world=8)["zero_optimization"]
    assert one["reduce_bucket_size"] == one["allgather_bucket_size"] == 5 * 10**8
    json.dumps(made)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"engine": "single"}, "train.engine"),
        ({"batch_size": 9}, "train.batch_size"),
        ({"batch_size": 6, "accumulate": 2}, "train.batch_size"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, object], field: str) -> None:
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        make_engine(network(text_tokenizer()), config, ParallelContext(world=2))
    assert caught.value.field == field


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingExtraError, match=r"\.\[train\]"):
        make_engine(network(text_tokenizer()), replace(CONFIG, engine="zero2"), ParallelContext())
