"""What the critic reads of a prompt against the numbers of the public implementations.

One of theirs leaves padding out, as ours does; another averages over all 200 places for words, padded or not: given
these places as visible, ours says its number. A third, of pi0, reads the denoising itself: its rollout value is the
mean over all steps and its training value that of one, so that they differ before anything is learnt. Ours is one
function.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prts_core.models.tokens import Prefix
from prts_core.rl.critic import features
from tests.models.golden_rl_case import cases, close, read

VIEW = 256  # tokens of a camera's picture in the public sequence, of which it has three


def pooled(hidden: Tensor, visible: Tensor) -> Tensor:
    """The mean over a prompt's tokens (S, H), the first part of the critic's features."""
    none = torch.zeros_like(visible)
    prefix = Prefix([], [], hidden, visible, none, visible.sum(1))
    return features(prefix, torch.zeros(len(hidden)))[:, : hidden.shape[2]]


def value(tensors: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    """Their value head: linear maps with ReLU between, under `at`.<number>."""
    numbers = sorted(int(name.split(".")[-2]) for name in tensors if name.startswith(at) and name.endswith("weight"))
    for i, number in enumerate(numbers):
        x = x.relu() if i else x
        x = x @ tensors[f"{at}.{number}.weight"].T + tensors.get(f"{at}.{number}.bias", 0.0)
    return x


@pytest.mark.parametrize("folder", cases("flow_native_value_from_prefix*"))
def test_golden_value_of_a_prompt_without_its_padding(folder):
    case = read(folder)
    some = case.inputs["prefix_mask"].any(1)  # a prompt without a token there is not
    found = pooled(case.inputs["prefix_out"][some], case.inputs["prefix_mask"][some])
    close(value(case.inputs, "param.mlp", found)[:, 0], case.outputs["value"][some], 1e-5, 1e-6)


@pytest.mark.parametrize("folder", cases("flow_chain_*vlm_value"))
def test_golden_value_of_a_prompt_with_its_padding(folder):
    case = read(folder)
    hidden = case.inputs["prefix_output"]
    visible = torch.ones(hidden.shape[:2], dtype=torch.bool)
    visible[:, case.facts["num_images_in_input"] * VIEW : 3 * VIEW] = False  # cameras that are not there
    found = value(case.inputs, "param.value_head.mlp", pooled(hidden, visible))[:, 0]
    close(found, case.outputs["recomputed.values"], 1e-5, 1e-6)
    close(found, case.outputs["train.prev_values"][:, 0], 1e-5, 1e-6)
