"""What a stretch of training costs: seconds by phase, tokens, samples, FLOPs, padding, memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Sequence

import torch

from prts_core.config.model import ModelConfig, TokensConfig
from prts_core.config.train import TrainConfig
from prts_core.training.batch import Batch
from prts_core.training.counts import StepCounts
from prts_core.training.flops import Counts, Part, forward_flops, peak_flops, training_flops
from prts_core.training.optim import unreached

# Of a step: waiting for data, forward, backward, the optimiser with the average, and waiting for a checkpoint.
PHASES = ("data_wait", "forward", "backward", "optimizer", "save")
# Metrics that differ between two runs of equal work: no digest may cover them.
TIMES = (
    "step_time_s",
    *(f"{phase}_s" for phase in PHASES),
    "data_wait_share",
    "loader_ceiling",
    "tokens_per_s",
    "samples_per_s",
    "tflops_per_s",
    "mfu",
    "memory_gb",
    "padding_share",  # of equal work over more processes, too
)


class Meter:
    """Counts from `restart` (or its making) to `read`; rates are those of all processes together.

    On a GPU phases are timed by its own events, read when the losses are: nothing is waited for between logs.
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, device: torch.device, vocabulary: int = 0) -> None:
        self.model, self.config, self.device, self.vocabulary = model, config, device, vocabulary
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        self.begin, self.steps, self.world = time.monotonic(), 0, 1
        self.tokens = self.samples = self.room = 0
        self.work, self.made_s = Counts(), 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what belongs to a phase. Waiting for data or for a disk is the host's."""
        if self.device.type != "cuda" or name in ("data_wait", "save"):
            begin = time.monotonic()
            yield
            self.seconds[name] += time.monotonic() - begin
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self.events.append((name, first, last))

    def count(self, counts: StepCounts, batches: Sequence[Batch]) -> None:
        """One step of all processes; batches: of this one."""
        self.steps += 1
        self.made_s += sum(batch.made_s for batch in batches)
        self.world = counts.world
        self.tokens += int(counts.whole("tokens").sum())
        self.room += int(counts.whole("room").sum())
        self.samples += int(counts.whole("samples").sum())
        draws = 1 if isinstance(self.model.expert, TokensConfig) else self.config.flow_samples
        self.work = self.work + counts.flops_counts(draws)

    def read(self) -> dict[str, float]:
        """TIMES, of a step in the mean. memory_gb: 10^9 bytes, the most so far, of the GPU's allocator or resident in
        this process. loader_ceiling: how many times the data of a step could be made in its time. mfu: where the GPU's
        peak is known. padding_share: of the positions, those that hold no token."""
        seconds = max(1e-9, time.monotonic() - self.begin)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device) / 1e9
            torch.cuda.synchronize(self.device)
            for name, first, last in self.events:
                self.seconds[name] += first.elapsed_time(last) / 1e3
            self.events.clear()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        steps, flops = max(1, self.steps), sum(step_flops(self.model, self.config, self.work, self.vocabulary).values())
        found = {"step_time_s": seconds / steps}
        found |= {f"{name}_s": spent / steps for name, spent in self.seconds.items()}
        found |= {
            "data_wait_share": self.seconds["data_wait"] / seconds,
            "loader_ceiling": seconds * max(1, self.config.workers) / max(1e-9, self.made_s),
            "tokens_per_s": self.tokens / seconds,
            "samples_per_s": self.samples / seconds,
            "tflops_per_s": flops / seconds / 1e12,
        }
        if self.peak is not None:
            found["mfu"] = flops / seconds / (self.peak * self.world)
        return found | {"memory_gb": memory, "padding_share": 1 - self.tokens / max(1, self.room)}


def step_flops(model: ModelConfig, config: TrainConfig, work: Counts, vocabulary: int) -> dict[Part, float]:
    """FLOPs of forward and backward by part, of what a recipe computes: losses without a weight are not."""
    weights = config.weights
    forward = forward_flops(model, work, vocabulary if weights.fast or weights.text else 0)
    forward["action"] *= bool(weights.flow)
    forward["contrastive"] *= bool(weights.contrastive)
    still = {*config.freeze, *unreached(config)} | ({"llm", "vision", "merger"} if config.lora is not None else set())
    sees, adapted = not {"vision", "merger"} <= still, config.lora is not None
    frozen: set[Part] = {"language", "logits"} if "llm" in still else set()
    if isinstance(model.expert, TokensConfig) and (adapted or "llm" in still):
        frozen.add("action")  # the language model's layers, but for a matrix
    # Where nothing that trains lies below or inside, no gradient enters.
    cut: set[Part] = set() if sees else {"vision"}
    if "llm" in still and not (sees or adapted):
        cut |= {"language", "logits"}
    for group, part in (("action", "action"), ("contrastive", "contrastive")):
        if group in still:
            (frozen if sees or adapted or "llm" not in still else cut).add(part)  # type: ignore[arg-type]
    return training_flops(forward, frozen, cut)
