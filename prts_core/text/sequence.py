"""The tokens of one sample: behaviour-cloning part, contrastive action copy, contrastive goal; ids, positions, roles.

Layout of a robot's sample (facts: PRTS role-aware mask), every part after the prompt optional:

    [system, camera lines, proprioception, <|obs_repr|>] [instruction <|goal_repr|>, prompt tail]
    [subtask text] [FAST response <|im_end|>]                                         the assistant's turn, labelled
    [copy of <|action_start|> FAST <|action_end|>, positions as in a response]        phi(s, a) read at its last token
    [instruction <|goal_repr|>, positions from 0]                                     psi(l) read at its last token

The action head reads the prompt and the subtask, never FAST tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from prts_core.config.model import Compat
from prts_core.text import prompt
from prts_core.text.tokenizer import TextTokenizer

IGNORE = -100


@dataclass(frozen=True)
class ImageTokens:
    """One image of a sample: the prompt's label and the image's grid of merged tokens (rows, columns)."""

    label: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Sample:
    """What the text of one robot sample is made of. state: tokens of the proprioception (`encode_states`). fast:
    indices of FAST tokens, or none where no action is shown. subtask: what the policy should say before it acts, ""
    where it is about to be generated, or none."""

    state: Sequence[int]
    instruction: str
    fast: Sequence[int] | None = None
    subtask: str | None = None


@dataclass(frozen=True)
class TokenSequence:
    """One sample as arrays. ids, labels (n,) int64; text_label (n,) bool; positions (3, n) int64; ends: columns where
    observation, BC part, contrastive action and contrastive goal end; visual (v,) int64: columns of visual tokens;
    state_action_index and goal_index: where phi and psi are read, -1 where they are not."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    text_label: np.ndarray
    ends: tuple[int, int, int, int]
    prompt_end: int
    visual: np.ndarray
    state_action_index: int = -1
    goal_index: int = -1

    def __len__(self) -> int:
        return len(self.ids)


class SequenceBuilder:
    """Sequences of one embodiment: its views never change, so that the head is made once.

    compat "prts": the released prompt, which has no <|obs_repr|> and <|goal_repr|> unless contrastive parts follow
    (`prompt.has_markers`); instruction and tail are then one text, since Qwen's tokenizer joins ".\\n".
    """

    def __init__(self, tokenizer: TextTokenizer, views: tuple[ImageTokens, ...], compat: Compat = "none") -> None:
        self.tokenizer, self.views, self.compat = tokenizer, views, compat
        labels = tuple(v.label for v in views)
        self.head = tokenizer.encode(prompt.head_text(labels, tuple(v.rows * v.columns for v in views)))
        self.head_positions = mrope_positions(self.head, tokenizer.id(prompt.IMAGE_PAD), views)
        self.visual = np.flatnonzero(np.array(self.head) == tokenizer.id(prompt.IMAGE_PAD))
        self.tail = tokenizer.encode(prompt.tail_text())
        self.subtask_tail = tokenizer.encode(prompt.tail_text(subtask=True))
        self.action_start = tokenizer.id(prompt.ACTION_START)
        self.action_end = tokenizer.id(prompt.ACTION_END)
        self.turn_end = tokenizer.encode(prompt.IM_END + "\n")
        self.obs = tokenizer.id(prompt.OBS)
        self.instruction = lru_cache(maxsize=4096)(
            lambda text: tokenizer.encode(prompt.instruction_text(text, compat=compat))
        )
        self.unmarked = lru_cache(maxsize=4096)(
            lambda text, subtask: tokenizer.encode(
                prompt.instruction_text(text, markers=False, compat=compat) + prompt.tail_text(subtask)
            )
        )
        self.subtask = lru_cache(maxsize=4096)(
            lambda text: tokenizer.encode(prompt.clean_instruction(text, compat=compat))
        )

    def encode_states(self, bins: np.ndarray) -> list[list[int]]:
        """(N, D) integers of the proprioception -> tokens of each, without the marker that follows them."""
        return self.tokenizer.encode_many([prompt.state_text(row, markers=False) for row in bins])

    def sequence(self, sample: Sample, *, response: bool, contrastive: bool) -> TokenSequence:
        """response: FAST tokens stand, labelled, in the assistant's turn. contrastive: the two extra parts follow."""
        instruction = self.instruction(sample.instruction)
        ids = [*self.head, *sample.state]
        if prompt.has_markers(contrastive, self.compat):
            ids.append(self.obs)
            observation_end = len(ids)
            ids += [*instruction, *(self.tail if sample.subtask is None else self.subtask_tail)]
        else:
            observation_end = len(ids)
            ids += self.unmarked(sample.instruction, sample.subtask is not None)
        after = len(ids)
        text_to = after
        if sample.subtask:
            ids += [*self.subtask(sample.subtask), *self.turn_end]
            text_to = len(ids)
        action = [] if sample.fast is None else self._action(sample.fast)
        if response:
            ids += [*action, *self.turn_end]
        bc_end = len(ids)
        if contrastive:
            ids += [*action, *instruction]
        crl_action_end = bc_end + (len(action) if contrastive else 0)

        tokens = np.array(ids, np.int64)
        labels = np.full(len(tokens), IGNORE, np.int64)
        labels[after:bc_end] = tokens[after:bc_end]
        text_label = np.zeros(len(tokens), bool)
        text_label[after:text_to] = True
        first = int(self.head_positions.max()) + 1 - len(self.head)  # text counts on after the last image
        positions = np.empty((3, len(tokens)), np.int64)
        positions[:, : len(self.head)] = self.head_positions
        positions[:, len(self.head) : bc_end] = first + np.arange(len(self.head), bc_end)
        positions[:, bc_end:crl_action_end] = first + after + np.arange(crl_action_end - bc_end)
        positions[:, crl_action_end:] = np.arange(len(tokens) - crl_action_end)
        return TokenSequence(
            tokens,
            positions,
            labels,
            text_label,
            (observation_end, bc_end, crl_action_end, len(tokens)),
            text_to,
            self.visual,
            crl_action_end - 1 if contrastive else -1,
            len(tokens) - 1 if contrastive else -1,
        )

    def lengths(
        self, states: np.ndarray, fast: np.ndarray, instructions: np.ndarray, *, response: bool, contrastive: bool
    ) -> np.ndarray:
        """Tokens of many samples (without subtasks) from the token counts of their parts, each (N,) int64; without
        markers there are a few less."""
        actions = fast + 2
        out = len(self.head) + states + 1 + instructions + len(self.tail)
        out = out + (actions + len(self.turn_end) if response else 0)
        return out + (actions + instructions if contrastive else 0)

    def subtask_length(self, text: str) -> int:
        """At most how many tokens a sample grows by where the policy is to say this subtask before it acts."""
        return len(self.subtask(text)) + len(self.turn_end) + max(0, len(self.subtask_tail) - len(self.tail))

    def _action(self, fast: Sequence[int]) -> list[int]:
        base = self.tokenizer.fast_base
        return [self.action_start, *(base + index for index in fast), self.action_end]


class ConversationBuilder:
    """Sequences of image-text conversations: the chat scaffold, the assistant's words labelled."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def sequence(self, turns: Sequence[tuple[str, str]], views: Sequence[ImageTokens]) -> TokenSequence:
        """turns: (role, text), role system, user or assistant; `<image>` in a text stands for the next view. DataError
        where their numbers differ."""
        own_system = bool(turns) and turns[0][0] == "system"
        ids: list[int] = [] if own_system else self.tokenizer.encode(prompt.system_text())
        labelled: list[tuple[int, int]] = []
        for opening, text, closing in prompt.conversation_texts(turns, tuple(v.rows * v.columns for v in views)):
            ids += self.tokenizer.encode(opening)
            begin = len(ids)
            ids += self.tokenizer.encode(text + closing)
            if opening.endswith("assistant\n"):
                labelled.append((begin, len(ids)))
        tokens = np.array(ids, np.int64)
        labels = np.full(len(tokens), IGNORE, np.int64)
        for begin, end in labelled:
            labels[begin:end] = tokens[begin:end]
        image_id, count = self.tokenizer.id(prompt.IMAGE_PAD), len(tokens)
        positions = mrope_positions(ids, image_id, views)
        visual = np.flatnonzero(tokens == image_id)
        return TokenSequence(tokens, positions, labels, labels != IGNORE, (0, count, count, count), 0, visual)


def mrope_positions(ids: Sequence[int], image_id: int, views: Sequence[ImageTokens]) -> np.ndarray:
    """(3, n) interleaved M-RoPE ids: text counts up; an image is a block of (0, row, column) offsets, after which text
    goes on past the longer side (Qwen2-VL)."""
    out = np.zeros((3, len(ids)), np.int64)
    at, position, view = 0, 0, 0
    while at < len(ids):
        if ids[at] != image_id:
            out[:, at] = position
            at, position = at + 1, position + 1
            continue
        rows, columns = views[view].rows, views[view].columns
        row, column = np.divmod(np.arange(rows * columns), columns)
        out[:, at : at + rows * columns] = position + np.stack([np.zeros_like(row), row, column])
        at, position, view = at + rows * columns, position + max(rows, columns), view + 1
    return out
