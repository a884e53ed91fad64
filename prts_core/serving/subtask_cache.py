"""Keeps what a policy said for a prompt and lets it act on those words for some looks before it speaks again.

Decoding words costs many times an action chunk, and a subtask outlives several looks. The prompt is the key, as in
public forks: two robots that were given the same sentence share what was said, so a server of several robots keeps
words for one look only, or gives each robot its own prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.io.errors import ConfigError
from prts_core.policy.observation import Answer

if TYPE_CHECKING:
    from prts_core.policy.policy import Policy

PROMPTS = 256  # kept at most; the one unused for longest goes first


class SubtaskCache:
    """A policy that reasons in subtasks, to be held like any other (prts_core.policy.observation.Acts).

    looks: action chunks that are made with the same words; 1 keeps nothing.
    """

    def __init__(self, policy: Policy, looks: int) -> None:
        if looks < 1 or not policy.processor.subtasks:
            raise ConfigError(
                "There are no subtasks to keep",
                field="--subtask-looks",
                found=looks,
                expected="at least 1, and a policy fine-tuned by stage subtask",
            )
        self.policy, self.looks = policy, looks
        self._said: OrderedDict[str, tuple[str, int]] = OrderedDict()  # prompt -> words, looks left

    @property
    def contract(self) -> PolicyContract:
        return self.policy.contract

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """As `Policy.act` of a batch: for prompts without words, or whose words have served, it speaks first."""
        return self._answer(observation, instruction, seeds, value=False).actions

    def act_and_value(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        answer = self._answer(observation, instruction, seeds, value=True)
        assert answer.values is not None
        return answer.actions, answer.values

    def _answer(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int], value: bool
    ) -> Answer:
        """Those that speak and those that act on kept words are two batches: nobody's pictures are looked at twice."""
        kept = [i for i, text in enumerate(instruction) if self._said.get(text, ("", 0))[1] > 0]
        words = [self._said[instruction[i]][0] for i in kept]
        places, answers = [], []
        for speaks, rows in ((False, kept), (True, [i for i in range(len(instruction)) if i not in kept])):
            if not rows:
                continue
            texts = [instruction[i] for i in rows]
            seen = {key: array[rows] for key, array in observation.items()}
            answer = self.policy.answer(seen, texts, [seeds[i] for i in rows], None if speaks else words, value)
            if answer.subtask is not None:
                self._said |= {text: (own, self.looks) for text, own in zip(texts, answer.subtask, strict=True)}
            places += rows
            answers.append(answer)
        for text in set(instruction):
            self._said[text] = (self._said[text][0], self._said[text][1] - 1)
            self._said.move_to_end(text)
        while len(self._said) > PROMPTS:
            self._said.popitem(last=False)
        order = np.argsort(places)
        actions = np.concatenate([answer.actions for answer in answers])[order]
        values = [answer.values for answer in answers if answer.values is not None]
        return Answer(actions, np.concatenate(values)[order] if values else None)

    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: Sequence[str]
    ) -> np.ndarray:
        return self.policy.value(observation, actions, instruction)
