"""Next-token cross-entropy that never holds the logits of all labels over the whole vocabulary.

The head is taken in slices of the vocabulary: the forward pass keeps one number a label (the logarithm of the softmax's
denominator), the backward pass makes each slice's logits again (Cut Cross-Entropy, Wijmans et al., arXiv:2411.09009).
Slices of the vocabulary rather than of labels: a row of the head's gradient is one sum over all labels, written once,
and a head in fp32 is cast for bf16 arithmetic a slice at a time. Nothing is read back to the host.

liger-kernel's fused cross-entropy (0.8.5) is not used: it goes by slices of labels, each of which adds to the whole of
the head's gradient, reads counts back to the host in every call, and has no rows that train apart from the table.

Shape legend: M labels, H hidden, V vocabulary, N rows of a slice, K rows that train apart from the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLICE = 2**25  # logits held at a time: 128 MiB in fp32


def head_logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """(..., H) -> (..., V). head: an embedding as output layer, or one that has `logits` itself (LoRA's)."""
    made: Tensor = head.logits(hidden) if hasattr(head, "logits") else F.linear(hidden, head.weight)  # type: ignore[operator, arg-type]
    return made


def token_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (M, H), labels (M,) int64 -> cross-entropy of each label (M,) float32, whether it was the guess (M,) bool.

    head: as of `head_logits`. Its weights are read here and again in the backward pass, without a call of the head
    itself: an engine that splits weights must have gathered them. ZeRO-3 gathers whatever a forward reads; under FSDP2
    the embeddings must belong to the unit of the root, whose forward this is part of.
    """
    table: Any = head.weight
    if len(labels) * len(table) <= SLICE:  # few enough to hold them
        logits = head_logits(head, hidden).float()
        return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(-1) == labels
    return _SlicedCrossEntropy.apply(hidden, labels, table, *(getattr(head, x, None) for x in ("rows", "place", "ids")))


class _SlicedCrossEntropy(torch.autograd.Function):
    """rows (K, H) with the numbers ids (K,) stand for the table's own; place (V,): a number's row, or -1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        table: Tensor,
        rows: Tensor | None,
        place: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        wide = torch.promote_types(ctx.dtype, torch.float32)
        x = hidden.to(ctx.dtype)
        total, best = x.new_full((2, len(labels)), -torch.inf, dtype=wide)
        wanted, guess = torch.zeros_like(total), torch.zeros_like(labels)
        for part in _slices(labels, table, rows, place):
            logits = part.logits(x, wide)
            value, at = logits.max(-1)
            number = at + part.first if ids is None or not part.of_rows else ids[at + part.first]
            ahead = (value > best) | ((value == best) & (number < guess))
            best, guess = torch.where(ahead, value, best), torch.where(ahead, number, guess)
            wanted += logits.gather(1, part.label)[:, 0].masked_fill(~part.inside, 0)
            total = torch.logaddexp(total, logits.logsumexp(-1))
        ctx.save_for_backward(hidden, labels, table, rows, place, total)
        right = guess == labels
        ctx.mark_non_differentiable(right)
        return total - wanted, right

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, labels, table, rows, place, total = ctx.saved_tensors
        wants_hidden, _, wants_table, wants_rows, *_ = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden, dtype=total.dtype) if wants_hidden else None
        of_table = torch.empty_like(table) if wants_table else None
        of_rows = torch.empty_like(rows) if wants_rows else None
        x = hidden.to(ctx.dtype)
        for part in _slices(labels, table, rows, place):
            of_part = of_rows if part.of_rows else of_table
            if of_hidden is None and of_part is None:
                continue
            of_logits = part.logits(x, total.dtype).sub_(total[:, None]).exp_()
            of_logits.scatter_add_(1, part.label, -part.inside[:, None].to(of_logits.dtype))
            narrow = of_logits.mul_(grad[:, None]).to(ctx.dtype)
            if of_hidden is not None:
                of_hidden += narrow @ part.weight.to(ctx.dtype)
            if of_part is not None:
                of_part[part.first : part.first + len(part.weight)] = narrow.T @ x
        return None if of_hidden is None else of_hidden.to(hidden.dtype), None, of_table, of_rows, None, None


class _Slice(NamedTuple):
    """Rows of the table from `first` on, or of those that train apart (of_rows); weight (N, H).

    taken (N,) bool: rows of the table for which others stand. inside (M,) bool: labels of this slice; label (M, 1):
    where in it, any place for others.
    """

    weight: Tensor
    first: int
    of_rows: bool
    taken: Tensor | None
    inside: Tensor
    label: Tensor

    def logits(self, x: Tensor, wide: torch.dtype) -> Tensor:
        """(M, N) float."""
        logits = F.linear(x, self.weight.to(x.dtype)).to(wide)
        return logits if self.taken is None else logits.masked_fill_(self.taken, -torch.inf)


def _slices(labels: Tensor, table: Tensor, rows: Tensor | None, place: Tensor | None) -> Iterator[_Slice]:
    size = max(1, SLICE // max(1, len(labels)))
    row = None if place is None else place[labels]
    for weight in (table, rows):
        if weight is None:
            continue
        of_rows = weight is rows
        for first in range(0, len(weight), size):
            part = weight[first : first + size]
            at = (labels if row is None or not of_rows else row) - first
            inside = (at >= 0) & (at < len(part))
            if row is not None and not of_rows:
                inside &= row < 0
            taken = None if place is None or of_rows else place[first : first + size] >= 0
            yield _Slice(part, first, of_rows, taken, inside, at.clamp(0, len(part) - 1)[:, None])
