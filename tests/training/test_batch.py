"""Batches are pure functions of (data, seed, position); packed samples do not see one another; rows are full."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.config.model import ModelConfig
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.text.prompt import task_id
from prts_core.text.sequence import ConversationBuilder, ImageTokens
from prts_core.training.batch import Batch, BatchSource, OneByOne, TrainingSample, chunk_windows
from prts_core.training.losses import prts_loss
from prts_core.training.packing import pack
from prts_core.training.stream import BLOCK, MixtureSampler, Permutation
from tests.fixtures.toy_source import ToySource

SENTENCES = ["open the faucet", "close the faucet", "press the button"]


class Conversations(OneByOne):
    """Image-text samples for a mixture."""

    name, tasks = "pictures", frozenset()

    def __init__(self, tokenizer, size: int = 32) -> None:
        self.builder, self.size = ConversationBuilder(tokenizer), size

    def __len__(self) -> int:
        return 5

    def _sequence(self, row: int):
        turns = [("user", "<image>\nwhat is this" + " now" * row), ("assistant", "a faucet")]
        return self.builder.sequence(turns, [ImageTokens("", 2, 2)])

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        return np.array([len(self._sequence(row)) for row in range(len(self))])

    def item(self, row: int, rng, *, response: bool, contrastive: bool) -> TrainingSample:
        return TrainingSample(self._sequence(row), [np.full((self.size, self.size, 3), 40 * row, np.uint8)])


def source(tiny: ModelConfig, sources, size: int = 6, **change) -> BatchSource:
    base = {
        "chunk_length": 4,
        "max_action_dim": 8,
        "patch": tiny.vision.patch_size,
        "merge": tiny.vision.merge_size,
        "response": True,
        "contrastive": 1,
    }
    return BatchSource(sources, [1.0] * len(sources), size, 7, **(base | change))


def same(a: Batch, b: Batch) -> bool:
    tensors = [(getattr(a, n), getattr(b, n)) for n in ("actions", "dof_mask", "is_pad", "task_id", "at")]
    tensors += [(getattr(a.tokens, n), getattr(b.tokens, n)) for n in ("ids", "positions", "pixels", "labels")]
    tensors.append((a.tokens.mask.key_end, b.tokens.mask.key_end))
    return a.ids == b.ids and a.cursor == b.cursor and all(torch.equal(x, y) for x, y in tensors)


# ---- the order of samples ----------------------------------------------------------------------------------------
def test_every_row_is_drawn_once_an_epoch_and_the_mixture_is_kept():
    stream = MixtureSampler([300, 100], [1.0, 2.0], seed=3)
    draws = [stream.draw(i) for i in range(2 * BLOCK)]
    first = [d.row for d in draws if d.source == 0]
    assert sorted(first[:300]) == list(range(300)) and sorted(first[300:600]) == list(range(300))
    assert first[:300] != first[300:600], "a fresh order an epoch"
    for half in (draws[:BLOCK], draws[BLOCK:]):
        assert abs(sum(d.source for d in half) / BLOCK - 200 / 500) < 1e-3
    assert MixtureSampler([300, 100], [1.0, 2.0], seed=3).draw(5000) == draws[5000], "any sample may be asked for first"


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_an_order_has_every_row_once(size, seed):
    order = Permutation(size, (seed, 2, 0, 1))
    assert sorted(order[i] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_an_order_is_no_pattern():
    """Neighbours fall anywhere, on a grid of 8 x 8 cells as often in each, and another epoch or seed is another order;
    chi-square of 63 degrees of freedom: 103 is one in a thousand."""
    size = 100_003
    order = Permutation(size, (7, 2, 0, 0))
    rows = np.array([order[i] for i in range(20_000)])
    for first, second in ((rows[:-1], rows[1:]), (np.arange(20_000), rows), (rows[:-2], rows[2:])):
        scale = [max(int(part.max()) + 1, 1) for part in (first, second)]
        cells = np.bincount(first * 8 // scale[0] * 8 + second * 8 // scale[1], minlength=64)
        assert ((cells - cells.mean()) ** 2 / cells.mean()).sum() < 103
    others = [Permutation(size, key) for key in ((7, 2, 0, 1), (8, 2, 0, 0), (7, 2, 1, 0))]
    assert all(np.mean([other[i] == rows[i] for i in range(2000)]) < 0.01 for other in others)


def test_an_order_of_many_rows_takes_no_memory():
    stream = MixtureSampler([200_000_000, 3], [1.0, 1e7], seed=1)
    rows = [d.row for d in map(stream.draw, range(10**12, 10**12 + 500)) if d.source == 0]
    assert len(set(rows)) == len(rows) > 100 and max(rows) > 10**8


def test_a_mixture_without_weight_is_refused():
    with pytest.raises(ValueError, match="positive weight"):
        MixtureSampler([0, 0], [1.0, 1.0], 0)


@pytest.mark.parametrize("packing", [0, 160])
def test_batches_resume_at_any_cursor(tiny, toy, tokenizer, packing):
    made = source(tiny, [toy, Conversations(tokenizer)], 3, pack_length=packing, pack_window=16)
    batches = list(islice(made.batches(made.start()), 9))
    again = source(tiny, [toy, Conversations(tokenizer)], 3, pack_length=packing, pack_window=16)
    resumed = list(islice(again.batches(batches[4].cursor), 4))
    assert all(same(a, b) for a, b in zip(resumed, batches[5:], strict=True))
    assert same(next(again.batches(batches[6].begin)), batches[6])


def test_loader_processes_make_the_same_batches(tiny, toy):
    made = source(tiny, [toy])
    alone = list(islice(made.batches(made.start()), 4))
    workers = made.batches(made.start(), workers=2)
    assert all(same(a, b) for a, b in zip(islice(workers, 4), alone, strict=True))


@pytest.mark.parametrize("packing", [0, 160])
def test_processes_share_a_joint_batch(tiny, toy, packing):
    whole = next(source(tiny, [toy], 4, pack_length=packing).batches({"window": 0, "row": 0, "sample": 0}))
    parts = [
        next(source(tiny, [toy], 4, pack_length=packing, rank=r, world=2).batches({"window": 0, "row": 0, "sample": 0}))
        for r in (0, 1)
    ]
    places = torch.cat([p.at for p in parts])
    assert sorted(places.tolist()) == list(range(whole.joint)) == whole.at.tolist()
    ids = [i for p in parts for i in p.ids]
    assert [ids[k] for k in places.argsort().tolist()] == whole.ids


# ---- packing -----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=150), st.integers(100, 300))
def test_every_sample_stands_in_one_row_that_holds_it(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == pack(lengths, capacity)


def test_8k_rows_are_nearly_full():
    """Lengths of the pre-training mixture: robot samples around 771 tokens, a fifth image-text of 80 to 500."""
    rng = np.random.default_rng(0)
    robots, words = rng.normal(771, 40, 2048), rng.integers(80, 500, 2048)
    lengths = np.where(rng.random(2048) < 0.2, words, robots).astype(int)
    assert sum(lengths) / (len(pack(lengths, 8192)) * 8192) >= 0.97
    alone = robots.astype(int) + rng.integers(-60, 60, 2048)
    assert sum(alone) / (len(pack(alone, 8192)) * 8192) >= 0.97


def test_a_sample_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 has 900 tokens"):
        pack([3, 900], 512)


def test_packed_samples_are_isolated(model, tiny, toy, tokenizer):
    """One sample changed in every way: no other sample of its row moves a bit, in states, values or actions."""
    made = source(tiny, [toy, Conversations(tokenizer)], 2, pack_length=330, pack_window=12)
    plan = next(made.plans(made.start()))
    before = made[plan]
    victim = plan.rows[0][1]
    assert len(plan.rows[0]) >= 3 and victim.source == 0

    toy.images[victim.row] = 255 - toy.images[victim.row]
    length = len(toy.states[victim.row])
    toy.states[victim.row] = toy.builder.encode_states(np.array([[999, 3, 500]]))[0]
    toy.fast[victim.row] = toy.fast[victim.row][::-1]
    assert len(toy.states[victim.row]) == length, "places must stay for the comparison to be to the bit"
    after = made[plan]

    def outputs(batch: Batch):
        with torch.no_grad():
            encoded = model.encode(batch.tokens)
            noise = torch.ones_like(batch.actions)
            prefix = encoded.prefix()
            velocity = model.velocity(prefix, noise, batch.dof_mask, torch.full((len(batch.at),), 0.3))
            return encoded.hidden, velocity, model.embed_state_actions(encoded), model.embed_goals(encoded)

    (hidden, *rest), (hidden2, *rest2) = outputs(before), outputs(after)
    own = before.tokens.sample == 1
    assert not torch.equal(hidden[own], hidden2[own])
    others = (before.tokens.sample >= 0) & ~own
    assert torch.equal(hidden[others], hidden2[others])
    keep = torch.arange(len(before.at)) != 1
    for a, b, moves in zip(rest, rest2, (True, True, False), strict=True):  # psi reads the sentence, which stays
        assert torch.equal(a[keep], b[keep]) and torch.equal(a[1], b[1]) != moves


def test_packed_loss_equals_padded_loss(model, tiny, toy, tokenizer):
    """The same samples, one a row or packed: the same losses, parameter by parameter the same gradients."""
    sources = [toy, Conversations(tokenizer)]
    packed = source(tiny, sources, 2, pack_length=330, pack_window=12)
    batch = packed[next(packed.plans(packed.start()))]
    padded = source(tiny, sources, len(batch.ids))
    plan = next(packed.plans(packed.start()))
    rows = [[d] for row in plan.rows for d in row]
    alike = padded[type(plan)(rows, True, plan.begin, plan.cursor)]
    config = TrainConfig(weights=LossWeights(1.0, 0.5, 1.0, 0.3), flow_samples=2)
    results = []
    for one in (batch, alike):
        model.zero_grad()
        loss, metrics = prts_loss(model, one, config, torch.Generator().manual_seed(0))
        loss.backward()
        results.append((metrics, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (left, left_grads), (right, right_grads) = results
    assert left.keys() == right.keys() and {"fast/toy", "vqa/pictures", "flow_matching/toy", "crl_loss"} <= left.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-5, rtol=1e-4, msg=name)
    for name, grad in left_grads.items():
        torch.testing.assert_close(grad, right_grads[name], atol=2e-5, rtol=1e-3, msg=name)


# ---- mixtures ----------------------------------------------------------------------------------------------------
def test_one_batch_mixes_embodiments_and_pictures(model, tiny, toy, tokenizer, fast):
    from prts_core.text.fast import FastTokenizer
    from prts_core.text.sequence import SequenceBuilder

    wide_fast = FastTokenizer.fit(np.random.default_rng(1).uniform(-1, 1, (100, 4, 5)), 128)
    one_view = SequenceBuilder(tokenizer, (ImageTokens("Camera top", 2, 2),))
    other = ToySource(one_view, wide_fast, SENTENCES[:2], name="wide", width=5, seed=9)
    made = source(tiny, [toy, other, Conversations(tokenizer)], 24)
    batch = next(made.batches(made.start()))
    widths = {batch.names[d]: set() for d in range(3)}
    for d, mask in zip(batch.tokens.dataset.tolist(), batch.dof_mask, strict=True):
        widths[batch.names[d]].add(int(mask[0].sum()))
    assert widths == {"toy": {3}, "wide": {5}, "pictures": {0}}
    loss, metrics = prts_loss(model, batch, TrainConfig(), torch.Generator().manual_seed(0))
    assert torch.isfinite(loss) and {"flow_matching/toy", "flow_matching/wide", "vqa/pictures"} <= metrics.keys()


def test_a_batch_of_one_task_has_no_contrastive_loss(model, tiny, builder, fast):
    alone = source(tiny, [ToySource(builder, fast, SENTENCES[:1])])
    loss, metrics = prts_loss(
        model, next(alone.batches(alone.start())), TrainConfig(), torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(loss) and "crl_loss" not in metrics


def test_the_temperature_has_a_ceiling_from_which_it_may_come_back(model):
    before = model.crl_logit_scale.data.clone()
    try:
        model.crl_logit_scale.data.fill_(6.0)
        assert model.log_scale.item() == pytest.approx(math.log(100.0))
        (grad,) = torch.autograd.grad(2 * model.log_scale, model.crl_logit_scale)
        assert grad.item() == 2.0, "the whole gradient, so that the parts of several processes add up"
    finally:
        model.crl_logit_scale.data.copy_(before)


def test_knowledge_insulation_gives_the_backbone_no_gradient_from_actions(model, tiny, toy):
    made = source(tiny, [toy])
    batch = next(made.batches(made.start()))
    weights = LossWeights(fast=0.0, text=0.0, flow=1.0, contrastive=0.0)
    for insulate in (True, False):
        model.zero_grad()
        loss, _ = prts_loss(
            model, batch, TrainConfig(weights=weights, insulate=insulate), torch.Generator().manual_seed(0)
        )
        loss.backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        backbone = {n for n in moved if n.startswith(("visual.", "language_model."))}
        assert {n for n in moved if n.startswith("dit_action_head.")} and (not backbone) == insulate


def test_too_wide_actions_are_refused(tiny, toy):
    made = source(tiny, [toy], max_action_dim=2)
    with pytest.raises(ValueError, match="raise max_action_dim"):
        next(made.batches(made.start()))


def test_windows_clamp_and_flag():
    windows, is_pad = chunk_windows(np.arange(3, dtype=np.float32)[:, None], 2)
    assert windows[..., 0].tolist() == [[0, 1], [1, 2], [2, 2]]
    assert is_pad.tolist() == [[False, False], [False, False], [False, True]]


def test_task_ids_ignore_case_and_blanks():
    assert task_id(" Open the faucet") == task_id("open the faucet") != task_id("close the faucet")
