"""Bad demonstrations are planted and found: by an honest value, by one really trained, and not by a useless one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.config.train import LossWeights, TrainConfig
from prts_core.data.index import DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.models.init import init_number_embeddings
from prts_core.models.prts import PrtsModel
from prts_core.policy.observation import Acts
from prts_core.policy.policy import Policy
from prts_core.stages.training import make_trainer
from prts_core.text import prompt
from prts_core.training.datasets import RobotDataset
from prts_core.value.ranking import Measured, Ranking, Thresholds, measure, rank, state_scale
from tests.fixtures.reaching import HonestPolicy, reaching_processor, write_reaching
from tests.fixtures.tiny_network import SENTENCES

PLANTED = {
    2: "reversed",
    9: "reversed",
    13: "reversed",
    4: "frozen",
    11: "frozen",
    0: "stuck",
    7: "camera",
    17: "wandering",
    5: "mislabelled",
    18: "mislabelled",
    28: "mislabelled",
}
FLAGS = {"stuck": "frozen", "camera": "frozen", "wandering": "frozen"}


def measured(policy: Acts, dataset: LeRobotDataset) -> list[Measured]:
    episodes = dataset.episodes()
    scale = state_scale(dataset, episodes)
    return [measure(policy, dataset, episode, SENTENCES, scale) for episode in episodes]


def found(ranking: Ranking) -> dict[int, str]:
    return {verdict.episode: verdict.flag.reason for verdict in ranking.flagged if verdict.flag}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    return write_reaching(tmp_path_factory.mktemp("spoiled"), per_goal=12, bad=PLANTED)


@pytest.fixture(scope="module")
def looked(spoiled: LeRobotDataset) -> list[Measured]:
    return measured(HonestPolicy(), spoiled)


def test_every_planted_demonstration_is_found_and_no_other(looked):
    assert found(rank(looked)) == {episode: FLAGS.get(kind, kind) for episode, kind in PLANTED.items()}


def test_a_flag_says_what_was_seen(looked):
    said = {verdict.episode: verdict.flag.detail for verdict in rank(looked).flagged if verdict.flag}
    assert "falls by" in said[2] and "peers rise by" in said[2]
    assert said[4].startswith("observation.state, observation.images.top still 100%")
    assert said[7].startswith("observation.images.top still")
    assert said[17].startswith("changes by")
    assert "'press the button' fits better by" in said[5]


def test_worst_come_first_and_good_ones_score_alike(looked):
    ranking = rank(looked)
    scores = [verdict.score for verdict in ranking.verdicts]
    assert scores == sorted(scores)
    assert all(v.score > 0.9 for v in ranking.verdicts if v.episode not in PLANTED)
    assert all(v.score < 0 for v in ranking.verdicts if PLANTED.get(v.episode) == "mislabelled")
    assert [v.best for v in ranking.verdicts if v.episode == 5] == ["press the button"]


def test_a_third_of_the_peers_may_be_bad(tmp_path):
    bad = dict.fromkeys((0, 3, 6, 9), "reversed")  # 4 of the 12 of one sentence
    ranking = rank(measured(HonestPolicy(), write_reaching(tmp_path, per_goal=12, bad=bad)))
    assert found(ranking) == bad


def test_a_useless_value_flags_nobody_by_value_and_says_so(spoiled):
    ranking = rank(measured(HonestPolicy(slope=0.0), spoiled))
    assert set(ranking.unsure) == set(SENTENCES)
    assert "does not rise" in ranking.unsure["open the faucet"]
    standing_still = {e: "frozen" for e, kind in PLANTED.items() if kind in ("frozen", "stuck", "camera")}
    assert found(ranking) == standing_still  # needs no value


def test_one_sentence_alone_has_no_margin(looked):
    alone = [replace(one, others={}) for one in looked if one.instruction == SENTENCES[1]]
    ranking = rank(alone)
    assert all(v.margin is None and v.best == v.instruction for v in ranking.verdicts)
    reasons = set(found(ranking).values())
    assert "reversed" in reasons and "mislabelled" not in reasons
    assert ranking.unsure == {}


def test_few_peers_are_joined_by_all_others(looked):
    one_of_a_kind = [replace(looked[1], instruction="wave", episode=100)]
    assert found(rank([*looked, *one_of_a_kind])) == found(rank(looked))


def test_thresholds_are_the_callers(looked):
    assert found(rank(looked, Thresholds(spread=1e9, still_share=1.0))) == {}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_an_episode_of_a_few_rows_is_ranked_too(looked, rows):
    short = replace(
        looked[1],
        episode=200,
        rows=list(range(rows)),
        own=[1.0] * rows,
        looks=[rows - 1],
        others={},
        moves={key: steps[: rows - 1] for key, steps in looked[1].moves.items()},
    )
    assert len(rank([*looked, short]).verdicts) == len(looked) + 1


def test_few_questions_are_asked(spoiled):
    policy = HonestPolicy()
    measured(policy, spoiled)
    assert policy.asked <= len(spoiled.rows) * (12 + 4 * (len(SENTENCES) - 1))


def test_measurements_are_what_the_policy_says(spoiled):
    policy = HonestPolicy(noise=0.0)
    one = measure(policy, spoiled, 1, SENTENCES, np.ones(3))
    states = spoiled.states(1)
    assert one.rows[0] == 0 and one.rows[-1] == len(states) - 1 and len(one.own) == 12
    seen = {"observation.state": states[one.rows]}
    np.testing.assert_allclose(one.own, policy.value(seen, np.empty(0), [SENTENCES[1]] * 12), atol=1e-4)
    look = [one.rows[i] for i in one.looks]
    seen = {"observation.state": states[look]}
    other = policy.value(seen, np.empty(0), [SENTENCES[2]] * len(look))
    np.testing.assert_allclose(one.others[SENTENCES[2]], other, atol=1e-4)
    quarters = [4 * row // len(states) for row in look]
    assert quarters == [0, 1, 2, 3]
    np.testing.assert_allclose(
        one.moves["observation.state"], np.linalg.norm(np.diff(states[one.rows], axis=0), axis=1), atol=1e-4
    )


@pytest.mark.slow
def test_a_trained_value_finds_them_among_its_own_training_episodes(tmp_path, tiny, tokenizer, fast):
    """A tiny network trained by contrastive RL alone on the good episodes ranks all of them and the planted ones."""
    planted = {episode: kind for episode, kind in PLANTED.items() if kind != "wandering"}  # none it could know of
    dataset = write_reaching(tmp_path, per_goal=14, bad=planted)
    good = [episode for episode in dataset.episodes() if episode not in planted]
    processor = reaching_processor(tmp_path, tiny, tokenizer, fast)
    torch.manual_seed(0)
    model = PrtsModel(tiny, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    init_number_embeddings(model, tokenizer.number_ids())
    recipe = TrainConfig(
        steps=200,
        batch_size=32,
        learning_rate=2e-3,
        gamma=0.9,
        warmup_steps=20,
        threads=1,
        checkpoint_every=1000,
        weights=LossWeights(fast=0.0, flow=0.0, contrastive=1.0),
    )
    rows = RobotDataset("reaching", dataset, DatasetIndex.of(dataset), processor, good)
    trainer = make_trainer(model, [rows], [1.0], recipe, 0)
    trainer.fit(tmp_path / "checkpoints", lambda step, metrics: None)
    model.load_state_dict(trainer.weights(True))
    flags = found(rank(measured(Policy(model, processor), dataset)))
    assert flags == {episode: FLAGS.get(kind, kind) for episode, kind in planted.items()}
