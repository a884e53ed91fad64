"""Quantised policies: the backbone is held in few bits, the head is not, and the actions stay near."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prts_core.delivery.quantize import quantize_policy
from prts_core.io.errors import CheckpointError
from prts_core.io.files import write_json
from prts_core.policy.policy import load_policy, policy_digest, policy_files
from prts_core.policy.quantized import BACKBONE, SCHEMES, held_bytes, require_plain_head
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("tiny") / "policy", MODEL)


def seen(policy) -> dict[str, np.ndarray]:
    meant, rng = policy.contract.contract, np.random.default_rng(0)
    out = {c.key: rng.integers(0, 256, (2, c.height, c.width, 3), np.uint8) for c in meant.cameras}
    return out | {"observation.state": rng.uniform(-1, 1, (2, len(meant.state))).astype(np.float32)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_backbone_is_packed_and_the_head_is_not(policy: Path, tmp_path: Path, scheme: str):
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    quantize_policy(policy, tmp_path / "q", scheme)
    full, small = load_policy(policy), load_policy(tmp_path / "q")
    assert small.dtype == "bf16" and "quantization.json" in policy_files(tmp_path / "q")
    assert policy_digest(tmp_path / "q") != policy_digest(policy)
    few = {name for name, one in small.model.named_buffers() if one.dtype in (torch.uint8, torch.int8)}
    assert bool(few) == (scheme != "bf16") and all(name.startswith(BACKBONE) for name in few)
    head = {one.dtype for name, one in small.model.named_parameters() if name.startswith("dit_action_head")}
    assert head == {torch.bfloat16}
    assert held_bytes(small.model) < held_bytes(full.model)
    observation, sentence = seen(full), ["open the faucet"] * 2
    ours, theirs = (
        full.answer(observation, sentence, [1, 2], value=True),
        small.answer(observation, sentence, [1, 2], value=True),
    )
    assert np.abs(ours.actions - theirs.actions).mean() < {"nf4": 0.2, "int8": 0.05, "bf16": 0.03}[scheme]
    assert np.isfinite(theirs.values).all()
    np.testing.assert_array_equal(theirs.actions, small.act(observation, sentence, [1, 2]))


def test_fewer_bits_hold_fewer_bytes_and_err_more(policy: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    full = load_policy(policy)
    observation, sentence = seen(full), ["open the faucet"] * 2
    expected = full.act(observation, sentence, [1, 2])
    size, error = {}, {}
    for scheme in SCHEMES:
        quantize_policy(policy, tmp_path / scheme, scheme)
        small = load_policy(tmp_path / scheme)
        size[scheme] = held_bytes(small.model)
        error[scheme] = float(np.abs(small.act(observation, sentence, [1, 2]) - expected).mean())
    assert size["nf4"] < size["int8"] < size["bf16"] and error["nf4"] > error["int8"] > 0


def test_what_is_refused(policy: Path, tmp_path: Path):
    quantize_policy(policy, tmp_path / "q", "int8")
    with pytest.raises(CheckpointError, match="computes in bf16"):
        load_policy(tmp_path / "q", "fp32")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize_policy(tmp_path / "q", tmp_path / "again", "int8")
    write_json(tmp_path / "q" / "quantization.json", {"scheme": "int2"})
    with pytest.raises(CheckpointError, match="not known here"):
        load_policy(tmp_path / "q")
    model = load_policy(policy).model
    model.dit_action_head.register_buffer("packed", torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"few bits.*dit_action_head\.packed"):
        require_plain_head(model)
