"""A checkpoint folder of the public release becomes a policy that acts: the golden weights behind small tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prts_core.config.load import shared_folder
from prts_core.data.normalize import normalize
from prts_core.errors import CheckpointError, ContractError
from prts_core.files import read_json, write_json
from prts_core.observation import STATE
from prts_core.policy import load_policy
from prts_core.processor import load_compat
from prts_core.released_policy import import_released
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer

CASE = shared_folder() / "golden" / "prts" / "flow_mot"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"golden case {CASE.name} is not on this machine")
CAMERAS = ("observation.images.image_0", "observation.images.camera_front")
WIDTH = 5  # of the actions; the network takes more


def stats(width: int, constant: int = -1) -> dict[str, list[float]]:
    low, high = -np.arange(1.0, width + 1), np.arange(1.0, width + 1)
    if constant >= 0:
        low[constant] = high[constant] = 0.5
    mean, std = (low + high) / 2, (high - low) / 4
    made = {"min": low, "max": high, "mean": mean, "std": std, "q01": low, "q99": high}
    return {name: values.tolist() for name, values in made.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The golden weights with the files that lie beside them in a released folder."""
    folder = tmp_path / "released"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CASE / name, folder / name)
    names = ["height", "width", "channel"]
    images = {key: {"dtype": "video", "shape": [32, 48, 3], "names": names} for key in CAMERAS}
    entry = {
        "features": {**images, "observation.state": {"dtype": "float32"}, "action": {"dtype": "float32"}},
        "stats": {"observation.state": stats(3, constant=1), "action": stats(WIDTH)},
    }
    record = {"state_mode": "MIN_MAX", **entry, "datasets": {"some/robot": entry}}
    (folder / "statistics.json").write_text(json.dumps(record))  # features in the order of the prompt
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(prompt.CONTROL_TOKENS))  # the golden ids follow 256 bytes, in this order
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    """A published FAST processor whose vocabulary fits the golden one."""
    room = json.loads((CASE / "config.json").read_text())["text_config"]["vocab_size"] - 256 - 12
    chunks = np.random.default_rng(0).uniform(-0.5, 0.5, (100, 6, WIDTH))
    made = FastTokenizer.fit(chunks, room - 2, scale=4, compat="prts")
    folder = tmp_path / "fast"
    folder.mkdir()
    write_json(folder / "processor_config.json", {"scale": 4, "min_token": made.min_token, "vocab_size": room - 2})
    made.bpe.save(str(folder / "tokenizer.json"))
    return folder


def imported(checkpoint: Path, fast: Path, output: Path, **changes: Any) -> Any:
    known: dict[str, Any] = {"fast": fast, "control_hz": 20, "embodiment_tag": "libero_panda", "view_tokens": (4, 9)}
    return import_released(checkpoint, output, **known | changes)


@needs_case
def test_golden_released_folder_becomes_a_policy(checkpoint: Path, fast: Path, tmp_path: Path) -> None:
    policy = imported(checkpoint, fast, tmp_path / "policy")
    assert load_compat(tmp_path / "policy") == policy.processor.compat == policy.model.compat == "prts"
    assert policy.processor.fast.compat == policy.processor.builder.compat == "prts"
    contract = policy.contract
    assert [c.label for c in contract.contract.cameras] == ["Camera top", "Cameraera front"], "as it was trained"
    assert contract.normalization == "MIN_MAX" and contract.chunk_length == policy.model.config.chunk_length
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for key in CAMERAS}
    state = np.array([0.5, 0.5, -3.0], np.float32)
    tokens = policy.processor.tokens({k: v[None] for k, v in images.items()}, state[None], ["Close the door!"])
    text = policy.processor.tokenizer.tokenizer.decode(tokens.ids[0].tolist(), skip_special_tokens=False)
    expected = prompt.state_text(np.array([750, 0, 0]), markers=False) + prompt.instruction_text(
        "Close the door!", markers=False, compat="prts"
    )
    assert expected + prompt.PREDICT in text and prompt.GOAL not in text and prompt.OBS not in text
    action = policy.act({STATE: state} | images, "Close the door!", seeds=7)
    assert action.shape == (contract.chunk_length, WIDTH) and np.isfinite(action).all()
    # The same chunk by hand: the network's sample, then the released inverse.
    noise = torch.randn(contract.chunk_length, policy.model.config.max_action_dim,
                        generator=torch.Generator().manual_seed(7))[None]  # fmt: skip
    mask = torch.zeros_like(noise)
    mask[..., :WIDTH] = 1
    with torch.inference_mode():
        sample = policy.model.sample(policy.model.encode(tokens).prefix(), noise, mask)[0, :, :WIDTH].numpy()
    own = policy.processor.statistics.action
    np.testing.assert_allclose(action, (sample + 1) / 2 * (own.max - own.min) + own.min, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(normalize(action, own, "MIN_MAX", "prts"), sample, rtol=1e-4, atol=1e-5)
    again = load_policy(tmp_path / "policy")
    assert np.array_equal(again.act({STATE: state} | images, "Close the door!", seeds=7), action)


@needs_case
def test_golden_other_token_ids_are_refused(checkpoint: Path, fast: Path, tmp_path: Path) -> None:
    raw = read_json(checkpoint / "config.json")
    found = raw["vision_start_token_id"]
    write_json(checkpoint / "config.json", raw | {"vision_start_token_id": found + 1})
    with pytest.raises(CheckpointError, match=rf"vision_start\|> is {found}"):
        imported(checkpoint, fast, tmp_path / "policy")


@needs_case
def test_golden_a_vocabulary_beyond_the_weights_is_refused(checkpoint: Path, fast: Path, tmp_path: Path) -> None:
    settings = read_json(fast / "processor_config.json")
    write_json(fast / "processor_config.json", settings | {"vocab_size": 4000})
    with pytest.raises(CheckpointError, match="disagree on token ids"):
        imported(checkpoint, fast, tmp_path / "policy")


@needs_case
def test_golden_marks_that_do_not_fit_are_refused(checkpoint: Path, fast: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="marks of relative actions"):
        imported(checkpoint, fast, tmp_path / "policy", relative=(True,))
    statistics = read_json(checkpoint / "statistics.json")
    for entry in (statistics, statistics["datasets"]["some/robot"]):
        entry["features"] = {"action": {"dtype": "float32"}}
    write_json(checkpoint / "statistics.json", statistics)
    with pytest.raises(CheckpointError, match="name no camera"):
        imported(checkpoint, fast, tmp_path / "policy")


def test_an_unknown_compat_is_refused(tmp_path: Path) -> None:
    for raw in ({"compat": "prt"}, {}, []):
        write_json(tmp_path / "processor_config.json", raw)
        with pytest.raises(CheckpointError, match="no valid compat"):
            load_compat(tmp_path)
