"""Measure the memory of two parts of a step that grow with real sizes: cross-entropy over the vocabulary, the prompt in
the action head's backward. Rows of `prts bench train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from prts_core.bench.peer import answer_of
from prts_core.bench.report import Row
from prts_core.config.model import MotConfig
from prts_core.models import cross_entropy
from prts_core.models.heads.mot.module import MotHead
from prts_core.models.tokens import Prefix

GIB = 2**30
LABELS, VOCABULARY, PART = 8192, 153_722, 10  # PRTS-4B's vocabulary; PART: of it, what is measured
WIDTH = 16  # of hidden states; what is measured does not depend on it


def rows(console: Console) -> list[Row]:
    return [cross_entropy_row(console), prompt_row(console)]


def cross_entropy_row(console: Console) -> Row:
    """Forward and backward beyond weights and gradients, each in a process of its own, over a tenth of the vocabulary.
    By slices the whole takes no more; otherwise ten times as much."""
    sliced, plain = (answer_of(["-m", __name__, name], OMP_NUM_THREADS="1") for name in ("sliced", "plain"))
    console.print(
        f"cross-entropy, {LABELS} labels, a tenth of {VOCABULARY} words in fp32: {sliced / GIB:.2f} GiB by slices, "
        f"{plain / GIB:.2f} otherwise (the whole: {plain * PART / GIB:.1f})"
    )
    return Row(
        f"cross-entropy memory, {LABELS} labels of {VOCABULARY} words / 1 GiB",
        sliced / GIB,
        1.0,
        "GiB",
        "lower",
        "<= 1.0",
    )


def _peak(kind: str) -> int:
    """Bytes that this process grows by in one pass, without the gradients."""
    if kind == "plain":
        cross_entropy.SLICE = LABELS * VOCABULARY
    head = nn.Embedding(VOCABULARY // PART, WIDTH)
    hidden = torch.randn(LABELS, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY // PART, (LABELS,))

    def step(count: int) -> None:
        cross_entropy.token_cross_entropy(hidden[:count], head, labels[:count])[0].sum().backward()

    def resident() -> int:
        """The most since it was last forgotten. getrusage would count what the parent had when this process began."""
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    step(1)  # libraries' own memory, and the gradients'
    Path("/proc/self/clear_refs").write_text("5")  # forget
    before = resident()
    step(LABELS)
    return resident() - before


def prompt_row(console: Console, layers: int = 4, samples: int = 2, prompt: int = 700, draws: int = 8) -> Row:
    """What the action head keeps for its backward, prompts of 700 tokens and chunks of 50 at 8 noise draws, beside the
    same head on prompts copied for each draw."""
    config = MotConfig(hidden_size=64, num_heads=4, intermediate_size=128)
    head = MotHead(config, layers=layers, kv_heads=2, head_dim=64, action_dim=8, chunk_length=50)
    cache = [torch.randn(samples, 2, prompt, 64, requires_grad=True) for _ in range(2 * layers)]
    visible = torch.ones(samples, prompt, dtype=torch.bool)
    prefix = Prefix(cache[:layers], cache[layers:], torch.zeros(samples, prompt, 1), visible, ~visible, visible.sum(1))
    count = samples * draws
    inputs = torch.randn(count, 50, 8), torch.ones(count, 50, 8), torch.rand(count)
    once = kept(lambda: head(*inputs, prefix))
    copied = kept(lambda: head(*inputs, prefix.map(lambda y: y.repeat_interleave(draws, dim=0))))
    console.print(f"action head, {draws} draws: {once / 1e6:.0f} MB for its backward, {copied / 1e6:.0f} MB otherwise")
    return Row(
        f"action head's backward, {draws} draws: memory / prompt copied",
        once / 1e6,
        copied / 1e6,
        "MB",
        "lower",
        "<= 0.6",
    )


def kept(call: Callable[[], object]) -> int:
    """Bytes of all storages that the backward of a call would read."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    assert result is not None  # until here it holds what is counted
    return sum(storages.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_peak(sys.argv[1])))
