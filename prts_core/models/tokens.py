"""What the backbone reads and what it leaves behind, as plain records of tensors.

B rows of L tokens hold S samples: one a row, right-padded, or many a row, packed. Everything said of a sample is (S,)
and names its place by `row` and by columns of that row; `mask` keeps packed samples apart.

Shape legend: B rows, L tokens a row, S samples, P tokens of the longest prompt,
G key/value heads, d head_dim, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from prts_kernels.role_attention import RoleMask


@dataclass
class Tokens:
    """One batch of sequences (made by prts_core.text.collate).

    ids, labels (B, L) int64, labels -100 where nothing is predicted; text_label (B, L) bool: labels that are words, the
    others are FAST action tokens; sample (B, L) int64: the sample a token belongs to, -1 for padding; positions (3, B,
    L) int64; mask: who sees whom, of all B * L tokens end to end; pixels (patches, C*P*P or C*2*P*P) float32 and
    grid (images, 3) int64 for all images, those of one size together; visual (V,) int64: where among the B * L tokens
    their merged patches stand; videos, video_grid and video likewise, none where there are no videos.
    predicts (M,) int64: which of the B * L tokens predict a label, the one that stands next. count:
    tokens that are no padding.
    The grids stay on the host, wherever the rest is: a GPU need not be asked for what a step's shapes depend on.
    Per-sample fields have shape (S,) int64. row: the sample's row of the batch. Columns in it: start; prompt_end, where
    the action head's prefix ends; state_action_index and goal_index, where phi and psi are read (-1: none). dataset: an
    index into the batch's names.
    prompt_width: P, max(prompt_end - start). packed: False promises S == B, row == arange and start == 0.
    """

    ids: Tensor
    positions: Tensor
    mask: RoleMask
    labels: Tensor
    text_label: Tensor
    sample: Tensor
    pixels: Tensor
    grid: Tensor
    visual: Tensor
    predicts: Tensor
    count: int
    row: Tensor
    start: Tensor
    prompt_end: Tensor
    state_action_index: Tensor
    goal_index: Tensor
    dataset: Tensor
    prompt_width: int
    packed: bool
    videos: Tensor | None = None
    video_grid: Tensor | None = None
    video: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device | str) -> Tokens:
        return changed(self, lambda tensor: tensor.to(device, non_blocking=True), ON_HOST)


@dataclass
class Prefix:
    """What an action head may read of each sample: keys and values per layer (S, G, P, d) after rotary embedding,
    hidden (S, P, H) after the final norm, visible (S, P) bool, image (S, P) bool: which of them are visual tokens.
    following (S,) int64: the position of a token that stood right behind it."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor
    visible: Tensor
    image: Tensor
    following: Tensor

    def map(self, change: Any) -> Prefix:
        """`change` applied to every tensor."""
        return Prefix(
            [change(k) for k in self.keys],
            [change(v) for v in self.values],
            change(self.hidden),
            change(self.visible),
            change(self.image),
            change(self.following),
        )

    def repeated(self, times: int) -> Prefix:
        """Every sample `times` times over, side by side."""
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))


@dataclass
class Encoded:
    """The backbone's result: hidden (B, L, H) after the final norm; keys and values of each layer (B, G, L, d)."""

    tokens: Tokens
    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    image: Tensor  # (B, L) bool

    def repeated(self, times: int) -> Encoded:
        """What was kept of every row `times` times over, side by side: for suffixes to be read behind, which look at
        no `tokens`. Not of packed rows."""
        kept = [[one.repeat_interleave(times, 0) for one in layers] for layers in (self.keys, self.values)]
        hidden, image = (one.repeat_interleave(times, 0) for one in (self.hidden, self.image))
        return Encoded(self.tokens, hidden, kept[0], kept[1], image)

    def prefix(self, insulate: bool = False) -> Prefix:
        """The prompts, one sample a row. insulate: cut gradients, so that an action head cannot move the backbone
        (knowledge insulation, pi0.5: action queries read stop-gradient keys and values)."""
        tokens, width = self.tokens, self.tokens.prompt_width
        column = torch.arange(width, device=self.hidden.device)
        visible = column < (tokens.prompt_end - tokens.start)[:, None]
        if tokens.packed:
            row = tokens.row[:, None]
            at = (tokens.start[:, None] + column).clamp(max=self.hidden.shape[1] - 1)
            keys = [k.transpose(1, 2)[row, at].transpose(1, 2) for k in self.keys]
            values = [v.transpose(1, 2)[row, at].transpose(1, 2) for v in self.values]
            hidden, image = self.hidden[row, at], self.image[row, at]
        else:
            keys, values = [k[:, :, :width] for k in self.keys], [v[:, :, :width] for v in self.values]
            hidden, image = self.hidden[:, :width], self.image[:, :width]
        following = tokens.positions[0, tokens.row, tokens.prompt_end - 1] + 1  # text counts alike in all three axes
        prefix = Prefix(keys, values, hidden, visible, image & visible, following)
        return prefix.map(Tensor.detach) if insulate else prefix


def predicted(labels: Tensor) -> Tensor:
    """(B, L) labels -> `Tokens.predicts`. Reads them back to the host."""
    place = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
    return place[:, :-1][labels[:, 1:] != -100]


@dataclass
class Suffix:
    """Tokens read behind what is encoded already, by kept keys and values (made by prts_core.text.collate).

    ids (S, Q) and positions (3, S, Q) int64, right-padded. kept (S,) int64: how many columns of its row a sample keeps,
    those of the observation. visible (S, Q, W) bool: which of the kept columns and the suffix, end to end, each token
    sees, W >= max(kept + own tokens). state_action_index, goal_index (S,) int64: columns of Q where phi and psi are
    read.
    """

    ids: Tensor
    positions: Tensor
    kept: Tensor
    visible: Tensor
    state_action_index: Tensor
    goal_index: Tensor

    def to(self, device: torch.device | str) -> Suffix:
        return changed(self, lambda tensor: tensor.to(device, non_blocking=True))


ON_HOST = ("grid", "video_grid")  # whatever the device


def changed(record: Any, change: Callable[[Any], Any], leave: Collection[str] = ()) -> Any:
    """A dataclass with `change` applied to its tensors and masks, and to those of its records of tensors, but for
    fields named in `leave`."""
    made = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, (Tensor, RoleMask)) and field.name not in leave:
            made[field.name] = change(value)
        elif isinstance(value, Tokens):
            made[field.name] = changed(value, change, leave)
    return replace(record, **made)
