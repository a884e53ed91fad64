"""Measure one part of `prts bench gpu` in a process of its own; each figure is printed at once, one JSON line.

`python -m prts_core.bench.gpu_parts NAME [--toy]`. On a CPU, and with --toy, sizes are toys: the machinery is tried,
the figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from prts_core.bench.kernels import SCRIPTS
from prts_core.bench.train import CAMERAS, PROPORTIONED, Rows
from prts_core.config.load import read_model
from prts_core.config.model import ModelConfig
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.io.files import read_json
from prts_core.models.backbone import fill_buffers
from prts_core.models.prts import PrtsModel
from prts_core.policy.observation import STATE
from prts_core.policy.policy import Policy
from prts_core.policy.processor import Processor
from prts_core.text import prompt
from prts_core.training.batch import Batch, BatchSource
from prts_core.training.flops import counts_of, peak_flops
from prts_core.training.losses import prts_loss
from prts_core.training.meter import step_flops
from prts_core.training.recompute import recompute_activations
from prts_core.training.trainer import Trainer

RELEASED = Path(__file__).resolve().parents[2] / "configs" / "models" / "prts_4b.yaml"
VOCABULARY = 153722  # of the release: Qwen's 151,936 rows, the tokens of PRTS and 2,048 of FAST, filled up
EQUAL = 1e-4  # of a loss, relative: fp32 on two devices that sum in another order
ATTENTION = (
    "triton",
    "split fa4",
    "split fa3",
    "split fa2",
    "split torch",
    "flex",
    "sdpa",
    "fa3 causal",
    "cudnn causal",
)


@dataclass(frozen=True)
class Figure:
    """value none: there is none, and `note` says why."""

    what: str
    value: float | None
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Setup:
    """The device, and whether the model is a toy or that of the release."""

    device: torch.device
    toy: bool

    def config(self) -> ModelConfig:
        if self.toy:
            return PROPORTIONED
        return read_model(RELEASED)[0]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Median of a call's wall clock, the device's work included."""
        found = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - begin)
        return median(found)


# ---- attention ---------------------------------------------------------------------------------------------------
def attention(setup: Setup) -> Iterator[Figure]:
    """Every implementation against the specification, then its times, by kernels/bench: a process each."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPTS / "role_attention.py"), "--quick", "--device", setup.device.type]
        command += ["--budget", "150", "--limit", "100", "--out", folder]
        if setup.device.type == "cuda":
            command += ["--only", *ATTENTION]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        files = sorted(Path(folder).glob("*.json"))
        if not files:
            yield Figure("attention", None, "", f"nothing measured, exit status {done.returncode}; the log says why")
            return
        results = read_json(files[-1])
    for name, one in results["checks"].items():
        right = None if one["why"] else float(one["error"])
        same = "same bits twice" if one.get("same_bits") else "other bits the second time"
        note = one["why"] or f"within flash-attention's rule, {same}"
        yield Figure(f"{name}: largest error", right, "absolute", note)
    for line in results["times"]:
        rate = f"{line['tflops']:.0f} TFLOP/s on visible pairs" if "tflops" in line else ""
        yield Figure(f"{line['baseline']}: {line['mode']}, {line['cell']}", line["ms"], "ms", rate)


# ---- training ----------------------------------------------------------------------------------------------------
def equality(setup: Setup) -> Iterator[Figure]:
    """Some steps of a small model in fp32, all losses, on the CPU and on this device: same start, same noise."""
    data = Rows(64)
    size, count = (3, 2) if setup.toy else (8, 5)
    config = TrainConfig(flow_samples=1, weights=LossWeights(1.0, 0.0, 1.0, 1.0))
    losses: dict[torch.device, list[float]] = {}
    for device in (torch.device("cpu"), setup.device):
        model = data.model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)
        stream, losses[device] = data.source(size, 1).batches({"sample": 0}), []
        for number in range(count):
            batch = next(stream).to(device)
            loss, _ = prts_loss(model, batch, config, torch.Generator().manual_seed(number))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(float(loss.detach()))
        stream.close()  # type: ignore[attr-defined]
    here, there = np.array(losses[torch.device("cpu")]), np.array(losses[setup.device])
    worst = float(np.abs(there / here - 1).max())
    equal = worst <= EQUAL
    note = f"limit {EQUAL:g}: {'equal' if equal else 'NOT EQUAL'}; {here[0]:.4f} to {here[-1]:.4f}"
    yield Figure(
        f"{count} steps in fp32, CPU against {setup.device.type}", worst, "relative difference of the loss", note
    )
    if not equal:
        sys.exit(f"losses on CPU and {setup.device.type} are not equal")


def random_network(config: ModelConfig, vocabulary: int, image: int, device: torch.device, dtype: Any) -> PrtsModel:
    """Made on the device itself; norms 1, all else small and random."""
    with torch.device("meta"):
        model = PrtsModel(config, vocabulary, image)
    fill_buffers(model, config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = torch.float32 if name == "crl_logit_scale" else dtype
            made = torch.empty(parameter.shape, device=device, dtype=kind)
            made = made.fill_(1.0) if parameter.ndim < 2 and name == "weight" else made.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(made))
    return model.to(device)


def network_for(data: Rows, setup: Setup, dtype: Any = torch.float32) -> PrtsModel:
    vocabulary = len(data.tokenizer) if setup.toy else VOCABULARY
    return random_network(data.config, vocabulary, data.tokenizer.id(prompt.IMAGE_PAD), setup.device, dtype)


def sft(setup: Setup) -> Iterator[Figure]:
    """Post-training: flow matching on padded batches."""
    weights = LossWeights(0.0, 0.0, 1.0, 0.0)
    config = TrainConfig(flow_samples=1, precision="bf16", weights=weights, freeze=("contrastive",))
    yield from steps(setup, "sft", config, (2,) if setup.toy else (32, 8))


def pretrain(setup: Setup) -> Iterator[Figure]:
    """Pre-training: FAST tokens and the contrastive loss on packed rows."""
    length = 512 if setup.toy else 8192
    weights = LossWeights(1.0, 0.0, 0.0, 1.0)
    config = TrainConfig(flow_samples=1, precision="bf16", weights=weights, pack_length=length, pack_window=64)
    yield from steps(setup, "pretrain", config, (1,) if setup.toy else (2, 1))


def steps(setup: Setup, what: str, config: TrainConfig, sizes: tuple[int, ...]) -> Iterator[Figure]:
    """A whole step of the trainer, and forward and backward on weights in bf16, each at the largest size that fits."""
    data = Rows(64, 128 if setup.toy else 256, config=setup.config())
    config = replace(config, activation_checkpointing=not setup.toy, learning_rate=1e-5, warmup_steps=1)
    for how, measure in (
        ("trainer: fp32 masters, AdamW, EMA", trainer_step),
        ("forward and backward, weights in bf16", bare_step),
    ):
        for size in sizes:
            gc.collect()
            torch.cuda.empty_cache()
            unit = "rows" if config.pack_length else "samples"
            name = f"{what}, {size} {unit}, {how}"
            try:
                yield from measured(setup, name, data, replace(config, batch_size=size), measure)
                break
            except torch.OutOfMemoryError as err:
                yield Figure(name, None, "samples/s", f"out of memory: {str(err).split('.')[0]}")


Step = Callable[[Batch], object]


def measured(
    setup: Setup, name: str, data: Rows, config: TrainConfig, measure: Callable[[Setup, Rows, TrainConfig], Step]
) -> Iterator[Figure]:
    source = source_of(data, config)
    batch = next(source.batches(source.start()))
    counts = counts_of(batch.tokens, config.flow_samples)
    vocabulary = len(data.tokenizer) if setup.toy else VOCABULARY
    flops = sum(step_flops(data.config, config, counts, vocabulary).values())
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, there = measure(setup, data, config), batch.to(setup.device)
    begin = time.perf_counter()
    step(there)
    setup.wait()
    yield Figure(f"{name}: first step", time.perf_counter() - begin, "s", "kernels compiled and chosen in it")
    seconds = setup.seconds(lambda: step(there), 2 if setup.toy else 5)
    padding = 1 - counts.tokens / batch.tokens.ids.numel()
    note = f"{counts.tokens} tokens, {padding:.0%} padding, {flops / 1e12:.1f} TFLOP a step"
    yield Figure(name, len(batch.tokens) / seconds, "samples/s", note)
    yield Figure(f"{name}: step", seconds, "s", f"{counts.tokens / seconds:.0f} tokens/s")
    if setup.device.type == "cuda":
        yield Figure(f"{name}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB", "most that was allocated")
        card = torch.cuda.get_device_name()
        peak = peak_flops(card)
        share = None if peak is None else flops / seconds / peak
        yield Figure(f"{name}: MFU", share, "share", f"of {card}'s dense bf16 peak; prts_core.training.flops")


def source_of(data: Rows, config: TrainConfig) -> BatchSource:
    packing = {"pack_length": config.pack_length, "pack_window": config.pack_window} if config.pack_length else {}
    return data.source(config.batch_size, int(config.weights.contrastive > 0), config.weights.fast > 0, **packing)


def trainer_step(setup: Setup, data: Rows, config: TrainConfig) -> Step:
    trainer = Trainer(network_for(data, setup).train(), source_of(data, config), config, 0)
    return lambda batch: trainer.step([batch], 0)


def bare_step(setup: Setup, data: Rows, config: TrainConfig) -> Step:
    model = network_for(data, setup, torch.bfloat16).train()
    if config.activation_checkpointing:
        recompute_activations(model)

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        prts_loss(model, batch, config, torch.Generator(setup.device).manual_seed(0))[0].backward()

    return step


# ---- a policy ----------------------------------------------------------------------------------------------------
def policy(setup: Setup) -> Iterator[Figure]:
    """Latency and throughput of act, and of act and value together, from pictures to actions in robot units."""
    data = Rows(16, 128 if setup.toy else 256, config=setup.config())
    made = synthetic_policy(data, setup)
    for size in (1, 2) if setup.toy else (1, 2, 4, 8, 16):
        seen = observation(made, data, size)
        texts, seeds = data.texts[:size], list(range(size))
        for what, call in (("act", made.act), ("act and value", made.act_and_value)):
            try:
                call(seen, texts, seeds)
                seconds = setup.seconds(lambda: call(seen, texts, seeds), 2 if setup.toy else 9)  # noqa: B023
            except torch.OutOfMemoryError:
                yield Figure(f"{what}, batch {size}", None, "ms", "out of memory")
                continue
            note = f"{size / seconds:.1f} chunks/s of {data.config.chunk_length}, in {made.dtype}"
            yield Figure(f"{what}, batch {size}", seconds * 1e3, "ms", note)


def observation(made: Policy, data: Rows, size: int) -> dict[str, np.ndarray]:
    contract = made.contract.contract
    seen = {camera.key: data.images[:size, i] for i, camera in enumerate(contract.cameras)}
    return seen | {STATE: np.zeros((size, len(contract.state)), np.float32)}


def synthetic_policy(data: Rows, setup: Setup) -> Policy:
    """Random weights behind a real processor."""
    side = data.images.shape[2]
    cameras = tuple(Camera(f"observation.images.{i}", label, side, side) for i, label in enumerate(CAMERAS))
    dims = [tuple(Dimension(f"{name}{i}") for i in range(width)) for name, width in (("s", 28), ("a", 7))]
    contract = Contract("synthetic", 10, dims[0], dims[1], cameras)
    ones = [np.ones(28), np.ones(7)]
    stats = [FeatureStats(0 * one, one, -one, one, -one, one) for one in ones]
    config = data.config
    processor = Processor(
        PolicyContract("synthetic", contract, config.chunk_length, "QUANTILE", "sha256:synthetic"),
        NormStats(stats[0], stats[1], 1, "train", "sha256:synthetic"),
        Path("norm_stats.json"),
        data.tokenizer,
        data.fast_tokenizer,
        config,
    )
    model = network_for(data, setup, torch.bfloat16)
    for head in (model.crl_action_encoder, model.crl_goal_encoder):
        head.float()
    return Policy(model, processor)


PARTS: dict[str, Callable[[Setup], Iterator[Figure]]] = {
    "attention": attention,
    "equality": equality,
    "sft": sft,
    "pretrain": pretrain,
    "policy": policy,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=tuple(PARTS))
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for figure in PARTS[args.name](Setup(device, args.toy or device.type == "cpu")):
        print(json.dumps(asdict(figure)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
