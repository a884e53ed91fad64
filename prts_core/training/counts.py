"""Count what each loss is a mean over, in a batch and in the joint batch of a step over processes and micro-batches.

A batch is counted where it is made, on the CPU; the counts of all processes are exchanged once a step. So a loss is
divided by a number that is known, and no step waits for the device to count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prts_core.models.tokens import Tokens
from prts_core.text.sequence import IGNORE
from prts_core.training.flops import Counts, counts_of
from prts_core.training.parallel import ParallelContext
from prts_kernels.info_nce import ALONE, Group, Processes

# Of each dataset: FAST labels, words that a robot's policy says, words of image-text data, samples with an action.
KINDS = ("fast", "subtask", "vqa", "flow")
# Of the whole batch: samples with the contrastive parts, their lowest and highest task id; tokens, tokens and padding,
# samples; what FLOPs are counted from (flops.Counts).
WHOLE = (
    "contrastive",
    "task_low",
    "task_high",
    "tokens",
    "room",
    "samples",
    "pairs",
    "patches",
    "patch_pairs",
    "prompt",
)
_NONE = (np.iinfo(np.int64).max, np.iinfo(np.int64).min)  # task ids of no sample


def count_items(
    tokens: Tokens, has_action: np.ndarray, contrastive: np.ndarray, task_id: np.ndarray, datasets: int
) -> np.ndarray:
    """(4 * datasets + 10,) int64 of one batch that lies on the CPU: KINDS of each dataset, then WHOLE.

    has_action (S,) bool; task_id (S,); contrastive: indices of the samples with the contrastive parts."""
    labels, text_label, sample = tokens.labels.numpy(), tokens.text_label.numpy(), tokens.sample.numpy()
    dataset = tokens.dataset.numpy()
    predicted = labels[:, 1:] != IGNORE
    owner = sample[:, 1:][predicted]
    word, robot, of = text_label[:, 1:][predicted], has_action[owner], dataset[owner]
    chosen = {"fast": ~word, "subtask": word & robot, "vqa": word & ~robot}
    kinds = [np.bincount(of[which], minlength=datasets) for which in chosen.values()]
    kinds.append(np.bincount(dataset[has_action], minlength=datasets))
    tasks = task_id[contrastive]
    low, high = (int(tasks.min()), int(tasks.max())) if len(tasks) else _NONE
    work = counts_of(tokens, 1)
    whole = [len(contrastive), low, high, work.tokens, sample.size, len(dataset)]
    whole += [work.pairs, work.patches, work.patch_pairs, work.prompt]
    return np.concatenate([*kinds, np.array(whole, np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class StepCounts:
    """What one step has. table (processes, micro-batches, items) int64, as `count_items`; rank: of this process."""

    table: np.ndarray
    rank: int = 0

    @staticmethod
    def gather(counts: Sequence[np.ndarray], parallel: ParallelContext) -> StepCounts:
        """From the micro-batches of each process; every process must call."""
        return StepCounts(parallel.gather(np.stack(counts)), parallel.rank)

    @property
    def world(self) -> int:
        return len(self.table)

    @property
    def parts(self) -> int:
        return self.table.shape[1]

    def by_dataset(self, kind: str) -> np.ndarray:
        """(datasets,) int64: items of a kind in the whole step."""
        datasets = (self.table.shape[2] - len(WHOLE)) // len(KINDS)
        at = KINDS.index(kind) * datasets
        return self.table[:, :, at : at + datasets].sum((0, 1))

    def total(self, *kinds: str) -> int:
        """Items of these kinds in the whole step."""
        return sum(int(self.by_dataset(kind).sum()) for kind in kinds)

    def whole(self, name: str) -> np.ndarray:
        """(processes, micro-batches) int64 of one of WHOLE."""
        return self.table[:, :, WHOLE.index(name) - len(WHOLE)]

    @property
    def has_negatives(self) -> bool:
        """Whether the step's contrastive samples are of two tasks at least."""
        return int(self.whole("task_low").min()) < int(self.whole("task_high").max())

    def flops_counts(self, draws: int) -> Counts:
        """What the step's FLOPs are counted from; draws: noise draws a sample."""
        of = {name: int(self.whole(name).sum()) for name in ("tokens", "pairs", "patches", "patch_pairs")}
        return Counts(
            **of,
            labels=self.total("fast", "subtask", "vqa"),
            draws=draws * self.total("flow"),
            context=int(self.whole("prompt").sum()),
            prompt=draws * int(self.whole("prompt").sum()),
            contrasted=int(self.whole("contrastive").sum()),
        )

    def processes(self) -> Processes:
        """How the step's contrastive samples lie over processes."""
        rows = self.whole("contrastive").sum(1).tolist()
        return Group(rows, self.rank) if self.world > 1 else ALONE
