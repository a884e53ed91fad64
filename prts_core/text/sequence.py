"""One sequence a sample: behaviour-cloning part, contrastive action copy, contrastive goal; ids, positions, role spans.

It does not know images beyond how many tokens each takes, nor losses. Layout (facts: PRTS role-aware mask):

    [system, camera lines, proprioception, <|obs_repr|>] [instruction <|goal_repr|>, prompt tail, (FAST response)]
    [copy of <|action_start|> FAST <|action_end|>, positions of the response] [instruction <|goal_repr|>, positions
    from 0]

phi(s, a) is read at the copy's <|action_end|>, psi(l) at the goal part's <|goal_repr|>.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from prts_core.models.prts import Tokens
from prts_core.text import prompt
from prts_core.text.tokenizer import TextTokenizer
from prts_kernels.role_attention import role_key_end

IGNORE = -100


@dataclass(frozen=True)
class View:
    """One camera of a sample: the prompt's label and the image's grid of merged tokens (rows, columns)."""

    label: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Sample:
    """What the text of one sample is made of. fast: indices of FAST tokens, or none where no action is shown."""

    state: np.ndarray  # (D,) integers
    instruction: str
    fast: tuple[int, ...] | None = None


class SequenceBuilder:
    def __init__(self, tokenizer: TextTokenizer, views: tuple[View, ...], merge: int) -> None:
        self.tokenizer, self.views, self.merge = tokenizer, views, merge
        labels = tuple(v.label for v in views)
        self.head = tokenizer.encode(prompt.head_text(labels, tuple(v.rows * v.columns for v in views)))
        self.head_positions = self._head_positions()  # (3, len(head))
        self.tail = tokenizer.encode(prompt.tail_text())
        self.action_start = tokenizer.id(prompt.ACTION_START)
        self.action_end = tokenizer.id(prompt.ACTION_END)
        self.after_response = tokenizer.encode(prompt.IM_END + "\n")
        self.encode_instruction = lru_cache(maxsize=4096)(lambda text: tokenizer.encode(prompt.instruction_text(text)))

    def _head_positions(self) -> np.ndarray:
        """Interleaved M-RoPE ids of the head: text counts up; an image is a block of (0, row, column) offsets."""
        image = self.tokenizer.id(prompt.IMAGE_PAD)
        out = np.zeros((3, len(self.head)), np.int64)
        at, position, view = 0, 0, 0
        while at < len(self.head):
            if self.head[at] != image:
                out[:, at] = position
                at, position = at + 1, position + 1
                continue
            rows, columns = self.views[view].rows, self.views[view].columns
            row, column = np.divmod(np.arange(rows * columns), columns)
            out[:, at : at + rows * columns] = position + np.stack([np.zeros_like(row), row, column])
            at, position, view = at + rows * columns, position + max(rows, columns), view + 1
        return out

    def grid(self, batch: int) -> torch.Tensor:
        """(batch * views, 3) patch grids (t, h, w), in the order the backbone reads images."""
        one = torch.tensor([[1, v.rows * self.merge, v.columns * self.merge] for v in self.views], dtype=torch.int64)
        return one.repeat(batch, 1)

    def build(self, samples: list[Sample], pixels: torch.Tensor, *, response: bool, contrastive: bool) -> Tokens:
        """Assemble a right-padded batch. response: FAST tokens stand (labelled) in the assistant's turn.
        contrastive: the
        two extra parts follow. pixels: patches of all images, sample by sample."""
        states = self.tokenizer.encode_many([prompt.state_text(s.state) for s in samples])
        rows = [self._row(sample, state, response, contrastive) for sample, state in zip(samples, states, strict=True)]
        width = max(len(row.ids) for row in rows)
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((3, len(rows), width), np.int64)
        labels = np.full((len(rows), width), IGNORE, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            positions[:, i, : len(row.ids)] = row.positions
            labels[i, row.label_from : row.label_to] = ids[i, row.label_from : row.label_to]
        ends = torch.tensor([row.ends for row in rows])
        return Tokens(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            key_end=role_key_end(width, *ends.unbind(1)),
            pixels=pixels,
            grid=self.grid(len(rows)),
            prompt_end=torch.tensor([row.prompt_end for row in rows]),
            phi_at=torch.tensor([row.ends[2] - 1 if contrastive else -1 for row in rows]),
            psi_at=torch.tensor([row.ends[3] - 1 if contrastive else -1 for row in rows]),
            labels=torch.from_numpy(labels),
        )

    def _row(self, sample: Sample, state: list[int], response: bool, contrastive: bool) -> _Row:
        instruction = self.encode_instruction(sample.instruction)
        observation_end = len(self.head) + len(state)
        ids = [*self.head, *state, *instruction, *self.tail]
        prompt_end = len(ids)
        first = self.head_positions.max() + 1
        text = np.arange(first, first + prompt_end - len(self.head))
        action = [] if sample.fast is None else self._action(sample.fast)
        positions = [self.head_positions, np.broadcast_to(text, (3, len(text)))]
        after = first + len(text)  # where the response begins, present or not
        if response:
            turn = [*action, *self.after_response]
            ids += turn
            positions.append(np.broadcast_to(np.arange(after, after + len(turn)), (3, len(turn))))
        bc_end = len(ids)
        if contrastive:
            ids += action
            positions.append(np.broadcast_to(np.arange(after, after + len(action)), (3, len(action))))
            crl_action_end = len(ids)
            ids += instruction
            positions.append(np.broadcast_to(np.arange(len(instruction)), (3, len(instruction))))
        else:
            crl_action_end = bc_end
        return _Row(
            ids, np.concatenate(positions, axis=1), prompt_end, bc_end if response else prompt_end, prompt_end,
            (observation_end, bc_end, crl_action_end, len(ids)),
        )  # fmt: skip

    def _action(self, fast: tuple[int, ...]) -> list[int]:
        base = self.tokenizer.fast_base
        return [self.action_start, *(base + index for index in fast), self.action_end]


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    positions: np.ndarray  # (3, len(ids))
    label_from: int
    label_to: int
    prompt_end: int
    ends: tuple[int, int, int, int]  # observation, bc, crl action, goal
