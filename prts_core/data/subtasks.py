"""Find the subtask that a row of an episode shows, and what `train_subtask` makes of it: another sentence and end.

Subtasks come from the episode's metadata (`EpisodeRow.spans`: both public forms); an episode without any is its own
single subtask (identity), as in the public LIBERO subtask recipe.

Where public material is silent: `end_frame` is exclusive, so that the last row of a subtask has 0 steps to go like the
last row of an episode (the release computes end - frame, one more, which scales all discount weights alike). A row in
a gap belongs to the subtask that comes next, a row after the last one to the last. "cumulate" is read as the sentences
of all subtasks up to the current one, in order, joined by ", ", with the current one's end as the goal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from prts_core.config.subtask_mode import SubtaskMode
from prts_core.data.goals import Stretch
from prts_core.io.errors import ConfigError, DataError

if TYPE_CHECKING:
    from prts_core.data.lerobot_v21.schema import EpisodeRow

JOIN = ", "


@dataclass(frozen=True)
class Subtask:
    """What one row shows. end_frame is exclusive; steps_to_end: rows until the subtask's last row, at least 0."""

    index: int
    text: str
    end_frame: int
    steps_to_end: int


@dataclass(frozen=True)
class Subtasks:
    """The subtasks of one episode. Without annotation: texts and ends are empty, the instruction stands for itself.

    stretches: its instructions by row, where they were read; none: it has the one `instruction`.
    """

    instruction: str
    length: int
    texts: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    stretches: tuple[Stretch, ...] = ()

    @staticmethod
    def of_episode(row: EpisodeRow, where: object = None) -> Subtasks:
        """From a line of meta/episodes.jsonl. DataError for spans that are malformed, out of order or too long."""
        from pydantic import ValidationError

        field = f"episode {row.episode_index}, action_config"
        try:
            spans = row.spans
        except (ValidationError, AttributeError, TypeError) as err:
            raise DataError(
                "The subtasks of an episode are malformed",
                file=where,
                field=field,
                found=" ".join(str(err).split())[:200],
                expected="[{end_frame, action_text}] or {steps: [{end_frame, step_description}]}",
            ) from err
        ends = [span.end_frame for span in spans]
        if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= row.length):
            raise DataError(
                "The subtasks of an episode are not in order",
                file=where,
                field=field,
                found=ends,
                expected=f"rising end frames from 1 to {row.length}",
                cure="correct meta/episodes.jsonl; `prts validate` names every such episode",
            )
        return Subtasks(row.tasks[0], row.length, tuple(span.action_text.strip() for span in spans), tuple(ends))

    @property
    def annotated(self) -> bool:
        return bool(self.texts)

    def stretch(self, row: int) -> Stretch:
        """The rows around `row` that have its instruction."""
        found = (stretch for stretch in self.stretches if row < stretch.end)
        return next(found, Stretch(0, self.length, self.instruction, self.length - 1))

    @property
    def instructions(self) -> tuple[str, ...]:
        return tuple(stretch.instruction for stretch in self.stretches) or (self.instruction,)

    def at(self, row: int) -> Subtask:
        """The subtask that row `row` shows; its instruction itself, to the last row that has it, where there are
        none."""
        if not 0 <= row < self.length:
            raise DataError("An episode has no such row", found=row, expected=f"0 to {self.length - 1}")
        if not self.texts:
            own = self.stretch(row)
            return Subtask(0, own.instruction, own.end, own.end - 1 - row)
        index = min(int(np.searchsorted(self.ends, row, side="right")), len(self.ends) - 1)
        return Subtask(index, self.texts[index], self.ends[index], max(self.ends[index] - 1 - row, 0))

    def target(
        self, mode: SubtaskMode, row: int, steps_to_go: int, rng: np.random.Generator | None = None
    ) -> tuple[str, int]:
        """(instruction, steps_to_go) that a training sample of `row` gets under `mode`.

        steps_to_go: to the goal of the row's instruction, -1 where that was not reached; used where the subtask is not.
        Of an episode that failed, its last subtask failed. rng: of this very sample; drawn from once, by "mixture"
        only, whether annotated or not, so that the draws after it do not depend on the annotation.
        """
        chosen = mode.kind in ("replace", "cumulate")
        if mode.kind == "mixture":
            if rng is None:
                raise ConfigError("A mixture of tasks and subtasks needs a generator per sample", field="train_subtask")
            chosen = bool(rng.random() < mode.weight)
        if not chosen or not self.annotated:
            return self.stretch(row).instruction, steps_to_go
        subtask = self.at(row)
        failed = steps_to_go < 0 and subtask.index == len(self.texts) - 1
        text = JOIN.join(t.rstrip(". ") for t in self.texts[: subtask.index + 1]) if mode.kind == "cumulate" else None
        return text or subtask.text, -1 if failed else subtask.steps_to_end


def sentences(episodes: Iterable[Subtasks], mode: SubtaskMode) -> list[str]:
    """Every instruction that `target` can give for `episodes` under `mode`, sorted: what a tokenizer is fitted on."""
    out: set[str] = set()
    for episode in episodes:
        starts = [0, *episode.ends[:-1]] if episode.annotated else [0]
        if mode.kind in ("off", "mixture") or not episode.annotated:
            out.update(episode.instructions)
        if mode.kind != "off" and episode.annotated:
            shown = SubtaskMode("replace") if mode.kind == "mixture" else mode
            out.update(episode.target(shown, row, 0)[0] for row in starts)
    return sorted(out)


def commonest(episodes: Iterable[Subtasks]) -> dict[str, str]:
    """The baseline "always the commonest subtask of the task": instruction -> subtask shown by most rows of it.

    Ties go to the alphabetically first, so that equal data gives equal baselines.
    """
    counts: dict[str, Counter[str]] = {}
    for episode in episodes:
        cuts = {0, episode.length, *episode.ends, *(one.start for one in episode.stretches)}
        for start, end in pairwise(sorted(cuts)):
            counts.setdefault(episode.stretch(start).instruction, Counter())[episode.at(start).text] += end - start
    return {task: min(count, key=lambda text: (-count[text], text)) for task, count in counts.items()}
