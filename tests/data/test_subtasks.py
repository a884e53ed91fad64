"""Subtasks per row: both public metadata forms, the four modes, identity, the commonest-subtask baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prts_core.config.subtask_mode import SubtaskMode
from prts_core.data.lerobot_v21.schema import EpisodeRow, parse
from prts_core.data.subtasks import Subtask, Subtasks, commonest, sentences
from prts_core.io.errors import ConfigError, DataError

LIST = [{"end_frame": 4, "action_text": "Reach it."}, {"end_frame": 9, "action_text": "turn it"}]
STEPS = {"steps": [{"end_frame": 4, "step_description": "Reach it."}, {"end_frame": 9, "step_description": "turn it"}]}


def episode(config: object = None, length: int = 10, task: str = "open the faucet") -> Subtasks:
    row = EpisodeRow.model_validate({"episode_index": 3, "tasks": [task], "length": length, "action_config": config})
    return Subtasks.of_episode(row, "meta/episodes.jsonl")


@pytest.mark.parametrize("config", [LIST, STEPS], ids=["list", "steps"])
def test_each_row_knows_its_subtask_and_how_far_its_end_is(config: object) -> None:
    made = episode(config)
    assert made.at(0) == Subtask(0, "Reach it.", 4, 3)
    assert made.at(3) == Subtask(0, "Reach it.", 4, 0)
    assert made.at(4) == Subtask(1, "turn it", 9, 4)
    assert made.at(9) == Subtask(1, "turn it", 9, 0)  # after the last one: the last, its goal reached
    with pytest.raises(DataError, match="0 to 9"):
        made.at(10)


def test_a_row_in_a_gap_belongs_to_what_comes_next() -> None:
    gap = [LIST[0], {"start_frame": 6, "end_frame": 9, "action_text": "turn it"}]
    assert episode(gap).at(5) == Subtask(1, "turn it", 9, 3)


def test_modes() -> None:
    made, plain = episode(LIST), episode()
    off, replace, cumulate = (SubtaskMode.parse(value) for value in (False, True, "cumulate"))
    assert made.target(off, 5, 40) == ("open the faucet", 40)
    assert made.target(replace, 5, 40) == ("turn it", 3)
    assert made.target(cumulate, 2, 40) == ("Reach it", 1)
    assert made.target(cumulate, 5, 40) == ("Reach it, turn it", 3)
    for mode in (off, replace, cumulate):
        assert plain.target(mode, 5, 4) == ("open the faucet", 4)  # identity
    assert plain.at(2) == Subtask(0, "open the faucet", 10, 7)


def test_a_mixture_draws_once_a_sample_from_its_own_generator() -> None:
    made, mode = episode(LIST), SubtaskMode.parse("mixture:0.25")

    def drawn(seed: int) -> list[tuple[str, int]]:
        return [made.target(mode, 5, 40, np.random.default_rng([seed, i])) for i in range(2000)]

    share = np.mean([target == ("turn it", 3) for target in drawn(0)])
    assert abs(share - 0.25) < 0.03 and drawn(0) == drawn(0) != drawn(1)
    assert {t for t, _ in drawn(0)} == {"turn it", "open the faucet"}
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    made.target(mode, 5, 40, one), episode().target(mode, 5, 40, other)
    assert one.random() == other.random()
    with pytest.raises(ConfigError, match="generator"):
        made.target(mode, 5, 40)


@pytest.mark.parametrize("value", [False, None, "false"])
def test_off_is_off(value: object) -> None:
    assert SubtaskMode.parse(value) == SubtaskMode("off")


def test_the_short_name_of_the_public_comment_is_an_alias() -> None:
    assert SubtaskMode.parse("mix:0.5") == SubtaskMode.parse("mixture:0.5") == SubtaskMode("mixture", 0.5)


@pytest.mark.parametrize("value", ["mixture", "mixture:2", "mixture:x", "mixture:nan", "cumulative", 3])
def test_unknown_modes_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"train_subtask.*mixture:W"):
        SubtaskMode.parse(value, "data.yaml")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([{"end_frame": 4}], "malformed"),
        ([{"end_frame": 9, "action_text": "a"}, {"end_frame": 4, "action_text": "b"}], "not in order"),
        ([{"end_frame": 11, "action_text": "a"}], "not in order"),
        ([{"end_frame": 0, "action_text": "a"}], "not in order"),
    ],
)
def test_bad_annotations_name_file_and_episode(config: object, words: str) -> None:
    with pytest.raises(DataError, match=rf"{words}.*episodes\.jsonl.*episode 3"):
        episode(config)


def test_steps_that_are_no_objects_are_refused_with_their_line() -> None:
    raw = {"episode_index": 3, "tasks": ["open"], "length": 10, "action_config": {"steps": ["reach"]}}
    with pytest.raises(DataError, match=r"episodes\.jsonl.*line 4, action_config.*steps must be a list of objects"):
        parse(EpisodeRow, raw, Path("episodes.jsonl"), 4)


def test_sentences_a_tokenizer_must_know() -> None:
    both = [episode(LIST), episode(task="press")]
    assert sentences(both, SubtaskMode.parse(False)) == ["open the faucet", "press"]
    assert sentences(both, SubtaskMode.parse(True)) == ["Reach it.", "press", "turn it"]
    assert sentences(both, SubtaskMode.parse("mix:.5")) == ["Reach it.", "open the faucet", "press", "turn it"]
    assert sentences(both, SubtaskMode.parse("cumulate")) == ["Reach it", "Reach it, turn it", "press"]


def test_the_commonest_subtask_counts_rows() -> None:
    short = episode([{"end_frame": 9, "action_text": "reach"}, {"end_frame": 10, "action_text": "turn"}])
    long = episode([{"end_frame": 2, "action_text": "reach"}, {"end_frame": 30, "action_text": "turn"}], 30)
    assert commonest([short]) == {"open the faucet": "reach"}
    assert commonest([short, long, episode(task="press")]) == {"open the faucet": "turn", "press": "press"}
