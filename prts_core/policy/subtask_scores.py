"""How often a policy says exactly the annotated subtask on held-out frames, beside the best constant answer.

Words are compared after the prompt's own clean-up, case and full stop included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.subtasks import Subtasks, commonest
from prts_core.io.progress import track
from prts_core.policy.observation import STATE
from prts_core.policy.policy import Policy
from prts_core.text import prompt

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """frames: scored. exact_match: share said exactly; baseline: share that "always the commonest subtask of the task"
    (counted on the training episodes) gets. tasks: task -> (frames, exact match, baseline). confusions: the commonest
    (wanted, said) pairs that differ."""

    frames: int
    exact_match: float
    baseline: float
    tasks: dict[str, tuple[int, float, float]]
    confusions: list[tuple[str, str, int]]

    def to_json(self) -> dict[str, object]:
        return {
            "frames": self.frames,
            "exact_match": self.exact_match,
            "baseline_commonest": self.baseline,
            "tasks": {
                task: {"frames": n, "exact_match": match, "baseline_commonest": plain}
                for task, (n, match, plain) in self.tasks.items()
            },
            "confusions": [{"wanted": w, "said": s, "frames": n} for w, s, n in self.confusions],
        }


def score_subtasks(
    policy: Policy, dataset: LeRobotDataset, index: DatasetIndex, trained: Sequence[int], every: int
) -> Score | None:
    """Every `every`-th row of the held-out episodes; none where the dataset has none. trained: episodes the baseline is
    counted on."""
    if "heldout" not in dataset.info.split_ranges or not dataset.episodes("heldout"):
        return None
    usual = commonest(index.subtasks(e) for e in trained)
    rows: list[tuple[str, str, str]] = []  # task, wanted, said
    for episode in track(dataset.episodes("heldout"), what="subtasks said"):
        known = index.subtasks(episode)
        said = said_along(policy, dataset, episode, known, every)
        rows += [
            (known.stretch(row).instruction, prompt.clean_instruction(known.at(row).text), words)
            for row, words in said.items()
        ]
    right = {task: [w == s for t, w, s in rows if t == task] for task in sorted({t for t, _, _ in rows})}
    plain = {
        task: [w == prompt.clean_instruction(usual.get(task, task)) for t, w, _ in rows if t == task] for task in right
    }
    wrong = Counter((w, s) for _, w, s in rows if w != s)
    return Score(
        len(rows),
        float(np.mean([w == s for _, w, s in rows])),
        float(np.mean([x for p in plain.values() for x in p])),
        {t: (len(right[t]), float(np.mean(right[t])), float(np.mean(plain[t]))) for t in right},
        [(w, s, n) for (w, s), n in wrong.most_common(10)],
    )


def said_along(policy: Policy, dataset: LeRobotDataset, episode: int, known: Subtasks, every: int) -> dict[int, str]:
    """row -> what the policy says there, for every `every`-th row of an episode."""
    rows = list(range(0, dataset.length(episode), every))
    states = dataset.states(episode)
    out: dict[int, str] = {}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        observation = {STATE: states[part]}
        for camera in policy.contract.contract.cameras:
            size = policy.processor.view_sizes[camera.key]
            observation[camera.key] = dataset.frames(episode, camera.key, part, size=size)
        out |= dict(
            zip(part, policy.subtask(observation, [known.stretch(row).instruction for row in part]), strict=True)
        )
    return out
