"""A step in several micro-batches that computes what one big batch would.

Cross-entropy is a mean over tokens and flow matching over samples, so micro-batches of unequal counts must not be
averaged alike: each gets the share of its own count. Noise is drawn for the whole step and cut. The contrastive loss
cannot be split: its negatives are those of one micro-batch, and the micro-batches' losses are averaged.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from prts_core.training.batch import Batch
from prts_core.training.ranks import Ranks
from prts_kernels.info_nce import Processes


def item_counts(batch: Batch, draws: int) -> dict[str, int]:
    """What each loss averages over in this batch, by the names that losses give to `Ranks.mean`.

    draws: noise draws a sample."""
    labelled = batch.tokens.labels[:, 1:] != -100
    words = int((labelled & batch.tokens.text_label[:, 1:]).sum())
    return {"fast": int(labelled.sum()) - words, "text": words, "flow": draws * int(batch.has_action.sum())}


class MicroRanks(Ranks):
    """The processes of one micro-batch, which takes its share of the whole step's means.

    totals: item_counts of the step over all processes; parts: number of micro-batches.
    """

    def __init__(self, inner: Ranks, totals: dict[str, int], parts: int) -> None:
        self.inner, self.totals, self.parts = inner, totals, parts
        self.rank, self.world = inner.rank, inner.world

    def total(self, count: int) -> int:
        return self.inner.total(count)

    def sum(self, values: Tensor) -> Tensor:
        return self.inner.sum(values)

    def processes(self, count: int) -> Processes:
        return self.inner.processes(count)

    def mean(self, local: Tensor, count: int, kind: str) -> Tensor:
        share = self.inner.total(count) / max(1, self.totals[kind])
        return share * self.inner.mean(local, count, kind)

    def whole(self, loss: Tensor) -> Tensor:
        return self.inner.whole(loss) / self.parts


def micro_batches(batches: list[Batch], draws: int, ranks: Ranks) -> list[tuple[Batch, Ranks]]:
    """The micro-batches of one step, each with its place in the step's noise and its share of the step's means."""
    if len(batches) == 1:
        return [(batches[0], ranks)]
    counts = [item_counts(batch, draws) for batch in batches]
    totals = {kind: ranks.total(sum(c[kind] for c in counts)) for kind in counts[0]}
    joint, begin = sum(batch.joint for batch in batches), 0
    made: list[tuple[Batch, Ranks]] = []
    for batch in batches:
        made.append((replace(batch, at=batch.at + begin, joint=joint), MicroRanks(ranks, totals, len(batches))))
        begin += batch.joint
    return made
