"""Weights on their way to copies of the policy: bit-equal when they arrive, refused where they do not belong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prts_core.io.errors import CheckpointError
from prts_core.rl.processes.weights import AT, IS, WHOLE, Holder, Publisher, WeightDiff


class Net(nn.Module):
    """With everything that a policy may have: frozen and tied weights, a transposed one, buffers, an empty one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(3, 50).t())
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.to(dtype)
        self.frozen.requires_grad_(False)


def bits(model: nn.Module) -> dict[str, bytes]:
    plain = {name: value.detach().contiguous().reshape(-1) for name, value in model.state_dict().items()}
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in plain.items() if value.numel()}


def update(model: nn.Module, seed: int, share: float = 1.0) -> None:
    """Change about `share` of the numbers of what trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                where = torch.rand(value.shape, generator=generator) < share
                value[where] += torch.randn(value.shape, generator=generator).to(value.dtype)[where]


@pytest.mark.parametrize("share", [1.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_copy_is_bit_equal_after_every_version(dtype: torch.dtype, share: float):
    learner = Net(dtype)
    publisher, holder = Publisher(learner), Holder(copy.deepcopy(learner))
    update(holder.model, 99)  # it does not matter what stood there
    holder.load(publisher.whole())
    for step in range(4):
        update(learner, step, share)
        learner.mean += step
        learner.scratch += 1
        learner.flags[step % 3] = True
        diff = publisher.publish()
        assert (diff.base, diff.version) == (step, step + 1)
        holder.load(diff)
        assert bits(holder.model) == bits(learner) and holder.version == step + 1
        assert holder.digest() == publisher.digest()
    assert not holder.model.scratch.any(), "what is in no state dict stays where it is"


def test_only_what_changed_travels():
    learner = Net()
    publisher = Publisher(learner)
    assert set(publisher.whole().tensors) == {"first.weight", "first.bias", "turned", "empty", "mean", "flags"}
    nothing = publisher.publish()
    assert not nothing.tensors and nothing.bytes == 0 and nothing.version == 1 and nothing.seconds > 0
    with torch.no_grad():
        learner.first.bias[3] = 1.0
        learner.turned += 1.0
        learner.frozen.weight += 1.0
    diff = publisher.publish()
    assert set(diff.tensors) == {"first.bias" + AT, "first.bias" + IS, "turned"}
    assert diff.bytes == 4 + 4 + 150 * 4
    assert diff.tensors["first.bias" + AT].tolist() == [3] and diff.tensors["first.bias" + IS].tolist() == [1.0]


def test_signs_of_zero_and_nan_travel():
    learner = Net()
    publisher, holder = Publisher(learner), Holder(copy.deepcopy(learner))
    holder.load(publisher.whole())
    with torch.no_grad():
        learner.first.bias[:] = torch.tensor([0.0, -0.0, math.nan, math.inf, 1, 2, 3, 4])
    holder.load(publisher.publish())
    assert bits(holder.model) == bits(learner)
    with torch.no_grad():
        learner.first.bias[:2] *= -1.0
    diff = publisher.publish()
    assert diff.tensors["first.bias" + AT].tolist() == [0, 1], "the NaN has not changed"
    holder.load(diff)
    assert bits(holder.model) == bits(learner)


def test_copies_of_another_precision():
    """What rounding removes is no change; what the copies hold is what the learner would round to."""
    learner = Net()
    publisher, holder = Publisher(learner, torch.bfloat16), Holder(Net().to(torch.bfloat16))
    holder.load(publisher.whole())
    with torch.no_grad():
        learner.first.weight += 1e-5 * learner.first.weight
        learner.turned[0, 0] = 5.0
    diff = publisher.publish()
    changed = sum(len(value) for name, value in diff.tensors.items() if name.endswith(AT))
    assert 1 <= changed < 10 and diff.tensors["turned" + IS].dtype == torch.bfloat16
    holder.load(diff)
    assert bits(holder.model) == bits(copy.deepcopy(learner).to(torch.bfloat16))


def test_another_version_is_refused():
    learner = Net()
    publisher, holder = Publisher(learner, version=7), Holder(copy.deepcopy(learner))
    first = publisher.publish()
    with pytest.raises(CheckpointError, match=r"Found: no version\. Expected: version 7"):
        holder.load(first)
    holder.load(publisher.whole())
    assert holder.version == 8
    with pytest.raises(CheckpointError, match=r"Found: version 8\. Expected: version 7"):
        holder.load(first)
    update(learner, 1)
    missed = publisher.publish()
    update(learner, 2)
    late = publisher.publish()
    before = bits(holder.model)
    with pytest.raises(CheckpointError, match="another version"):
        holder.load(late)
    assert bits(holder.model) == before and holder.version == 8
    holder.load(missed)
    holder.load(late)
    assert bits(holder.model) == bits(learner)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"first.bias": torch.zeros(8), "other": torch.zeros(1)}, "does not have"),
        ({"first.bias": torch.zeros(8), "turned": torch.zeros(3, 50)}, r"\(3, 50\)"),
        ({"first.bias": torch.zeros(8), "turned": torch.zeros(50, 3).half()}, "float16"),
        ({"first.bias": torch.zeros(8), "turned" + AT: torch.tensor([150]), "turned" + IS: torch.zeros(1)}, "1 values"),
        ({"first.bias": torch.zeros(8), "turned" + AT: torch.tensor([-1]), "turned" + IS: torch.zeros(1)}, "1 values"),
        ({"first.bias": torch.zeros(8), "turned" + AT: torch.tensor([1]), "turned" + IS: torch.zeros(2)}, "1 values"),
    ],
)
def test_what_does_not_fit_changes_nothing(tensors: dict, told: str):
    holder = Holder(Net())
    before = bits(holder.model)
    with pytest.raises(CheckpointError, match=told):
        holder.load(WeightDiff(WHOLE, 3, tensors))
    assert bits(holder.model) == before and holder.version < 0


def test_other_parameters_that_begin_to_train_are_told():
    learner = Net()
    publisher = Publisher(learner)
    learner.frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match="new Publisher"):
        publisher.publish()


def test_what_was_published_does_not_change_afterwards():
    learner = Net()
    publisher = Publisher(learner)
    update(learner, 1)
    diff, whole = publisher.publish(), publisher.whole()
    kept = {name: value.clone() for name, value in diff.tensors.items()}
    update(learner, 2)
    publisher.publish()
    for name, value in kept.items():
        assert torch.equal(diff.tensors[name], value) and torch.equal(whole.tensors[name], value)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 99), st.sampled_from([0.0, 0.01, 0.2, 1.0])), max_size=5), st.booleans())
def test_any_way_leads_to_the_same_weights(steps: list[tuple[int, float]], half: bool):
    """Every diff in turn, or the whole at the end."""
    dtype = torch.bfloat16 if half else None
    learner = Net()
    publisher = Publisher(learner, dtype)
    turn, once = (Holder(Net(dtype or torch.float32)) for _ in range(2))
    turn.load(publisher.whole())
    for seed, share in steps:
        update(learner, seed, share)
        turn.load(publisher.publish())
    once.load(publisher.whole())
    assert bits(turn.model) == bits(once.model) == bits(copy.deepcopy(learner).to(dtype or torch.float32))
    assert turn.digest() == once.digest() == publisher.digest()
