"""Success recorded, failed and not recorded differ; instructions follow the rows; training takes each as it is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prts_core.config.train import Failures, TrainConfig
from prts_core.data.goals import SUCCESS, Stretch, goal_row, stretches
from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.seal import seal
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, write_json
from prts_core.text import prompt
from prts_core.training.batch import BatchSource
from prts_core.training.datasets import RobotDataset, held_out_set
from prts_core.training.losses import log_discount
from prts_core.value.curves import heldout_curves
from tests.fixtures.reaching import reaching_processor, write_reaching
from tests.fixtures.tiny_network import SENTENCES

Change = Callable[[int, dict[str, np.ndarray]], None]


def changed(root: Path, change: Change, success: bool = False) -> LeRobotDataset:
    """The dataset with the columns of each episode as `change` leaves them. success: `next.success` is one of them."""
    info = read_json(root / "meta" / "info.json")
    if success:
        info["features"][SUCCESS] = {"dtype": "bool", "shape": [1], "names": None}
        write_json(root / "meta" / "info.json", info)
    for index, path in enumerate(sorted(root.glob("data/*/*.parquet"))):
        table = pq.read_table(path)
        columns = {"task_index": table["task_index"].to_numpy().copy()}
        if success:
            columns[SUCCESS] = np.zeros(table.num_rows, bool)
        change(index, columns)
        for name, values in columns.items():
            table = table.drop_columns([name]) if name in table.column_names else table
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, path)
    seal(root)
    return LeRobotDataset.open(root)


def succeed(*episodes: int) -> Change:
    def change(index: int, columns: dict[str, np.ndarray]) -> None:
        columns[SUCCESS][-2:] = index in episodes

    return change


def halves(index: int, columns: dict[str, np.ndarray]) -> None:
    """Episode 0 is asked for another place half-way."""
    tasks = columns["task_index"]
    if index == 0:
        tasks[len(tasks) // 2 :] = (tasks[0] + 1) % len(SENTENCES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_reaching(tmp_path, per_goal=2).root


def test_not_recorded_succeeds_at_the_last_row_and_recorded_says_where_or_that_it_failed(root: Path) -> None:
    plain = LeRobotDataset.open(root)
    last = plain.length(1) - 1
    assert stretches(plain, 1) == [Stretch(0, last + 1, SENTENCES[1], last)]
    dataset = changed(root, succeed(1), success=True)
    assert goal_row(dataset, 1) == last - 1 and goal_row(dataset, 0) is None
    assert stretches(dataset, 1)[0].steps_to_go().tolist() == [*range(last - 1, 0, -1), 0, 0]
    assert set(stretches(dataset, 0)[0].steps_to_go().tolist()) == {-1}


def test_each_row_has_the_instruction_that_it_follows(root: Path) -> None:
    dataset = changed(root, halves)
    length = dataset.length(0)
    first, second = stretches(dataset, 0)
    assert first == Stretch(0, length // 2, SENTENCES[0], length // 2 - 1)
    assert second == Stretch(length // 2, length, SENTENCES[1], length - 1)
    episode = DatasetIndex.of(dataset).subtasks(0)
    assert [episode.at(0).text, episode.at(length - 1).text] == SENTENCES[:2]
    assert episode.at(0).steps_to_end == length // 2 - 1


def test_a_stretch_that_another_one_follows_has_ended_well_and_the_last_one_may_have_failed(root: Path) -> None:
    def change(index: int, columns: dict[str, np.ndarray]) -> None:
        halves(index, columns)
        columns[SUCCESS][-1] = index == 1

    first, second = stretches(changed(root, change, success=True), 0)
    assert first.goal == first.end - 1 and second.goal is None


def test_a_row_of_a_task_that_nobody_names_is_told(root: Path) -> None:
    dataset = changed(root, lambda index, columns: columns["task_index"].__setitem__(3, 77))
    with pytest.raises(DataError, match=r"row 3, task_index.*77"):
        stretches(dataset, 0)


# ---- training --------------------------------------------------------------------------------------------------------
@pytest.fixture
def trained(tmp_path: Path, tiny, tokenizer, fast) -> Callable[..., RobotDataset]:
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)

    def make(dataset: LeRobotDataset, failures: Failures = "leave_out", **options) -> RobotDataset:
        index, episodes = DatasetIndex.of(dataset), dataset.episodes("train")
        return RobotDataset("reaching", dataset, index, processor, episodes, failures=failures, **options)

    return make


def samples(rows: RobotDataset):
    every = range(len(rows))
    return rows.items(every, [np.random.default_rng(i) for i in every], response=True, contrastive=True)


def test_failed_episodes_are_left_out_unless_they_are_asked_for(root: Path, trained) -> None:
    dataset = changed(root, succeed(1, 2), success=True)
    good = sum(dataset.length(episode) for episode in (1, 2))
    every = sum(dataset.length(episode) for episode in dataset.episodes())
    assert len(trained(dataset)) == good and all(one.steps_to_go >= 0 for one in samples(trained(dataset)))

    rows = trained(dataset, "negatives")
    failed = [one for one in samples(rows) if one.steps_to_go < 0]
    assert len(rows) == every and len(failed) == every - good
    assert all(one.chunk is None and (one.sequence.labels < 0).all() for one in failed), "nothing of it is imitated"
    assert all(one.sequence.state_action_index >= 0 for one in failed)

    cloned = [one for one in samples(trained(dataset, "clone")) if one.steps_to_go < 0]
    assert len(cloned) == every - good and all(one.chunk is not None for one in cloned), "and no goal reached"


def test_a_dataset_that_never_succeeds_is_refused_and_held_out_failures_are_no_measure(root: Path, trained) -> None:
    dataset = changed(root, succeed(), success=True)
    with pytest.raises(DataError, match=r"No episode reached its goal.*next\.success"):
        trained(dataset)
    assert held_out_set("reaching", dataset, DatasetIndex.of(dataset), None) == []  # type: ignore[arg-type]
    dataset.info.splits["heldout"] = "0:6"
    with pytest.raises(DataError, match=r"No held-out episode reached its goal.*next\.success"):
        heldout_curves(None, dataset, 3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("failures", ["negatives", "clone"])
def test_failures_alone_may_be_asked_for(root: Path, trained, failures: Failures) -> None:
    rows = trained(changed(root, succeed(), success=True), failures)
    assert len(rows) and {one.steps_to_go for one in samples(rows)} == {-1}


def test_what_no_sample_is_taken_from_is_no_task(root: Path, trained) -> None:
    """Or a mixture would seem to have negatives, and the contrastive loss be 0 without a word."""
    dataset = changed(root, succeed(1), success=True)
    assert trained(dataset).tasks == {prompt.task_id(SENTENCES[1])}
    assert len(trained(dataset, "negatives").tasks) == len(SENTENCES)


def test_a_chunk_ends_where_its_instruction_does(root: Path, trained) -> None:
    rows = trained(changed(root, halves))
    half = int(rows.index.lengths[0]) // 2
    last, first = samples(rows)[half - 1 : half + 1]
    assert last.is_pad is not None and first.is_pad is not None and last.chunk is not None
    assert last.is_pad.tolist() == [False, *[True] * (len(last.is_pad) - 1)] and not first.is_pad[0]
    assert (last.chunk == last.chunk[:1]).all(), "nothing of what was done for the next one"


def test_what_is_said_follows_the_rows(root: Path, trained) -> None:
    rows = trained(changed(root, halves))
    length = int(rows.index.lengths[0])
    ids = [one.task_id for one in samples(rows)[:length]]
    assert set(ids[: length // 2]) == {prompt.task_id(SENTENCES[0])}
    assert set(ids[length // 2 :]) == {prompt.task_id(SENTENCES[1])}
    assert len(rows.lengths(response=True, contrastive=True)) == len(rows)


@pytest.mark.parametrize("say_subtask", [False, True])
def test_no_sample_is_longer_than_was_counted(root: Path, trained, say_subtask: bool) -> None:
    rows = trained(changed(root, halves), say_subtask=say_subtask)
    counted = rows.lengths(response=True, contrastive=True)
    assert (np.array([len(one.sequence) for one in samples(rows)]) <= counted).all()


def test_a_horizon_in_seconds_means_the_same_at_every_control_rate(root: Path, trained, tiny) -> None:
    rows = trained(changed(root, succeed(1, 2), success=True), "negatives")
    source = BatchSource(
        [rows],
        [1.0],
        32,
        5,
        chunk_length=tiny.chunk_length,
        max_action_dim=tiny.max_action_dim,
        patch=tiny.vision.patch_size,
        merge=tiny.vision.merge_size,
        response=True,
        contrastive=1,
    )
    (batch,) = islice(source.batches(source.start()), 1)
    seconds = batch.steps_to_go / 20
    reached = batch.steps_to_go >= 0
    assert 0 < int(reached.sum()) < len(reached)
    found = log_discount(batch, TrainConfig(horizon_s=2.0))
    torch.testing.assert_close(found[reached], -seconds[reached] / 2.0)
    assert torch.isneginf(found[~reached]).all()
    torch.testing.assert_close(
        log_discount(batch, TrainConfig(gamma=float(np.exp(-1 / 40))))[reached], found[reached], rtol=1e-5, atol=1e-6
    )
