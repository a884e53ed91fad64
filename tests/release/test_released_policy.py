"""A checkpoint folder of the public release becomes a policy that acts: the golden weights behind small tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prts_core.cli import main as cli
from prts_core.data.normalize import normalize
from prts_core.io.errors import CheckpointError, ContractError
from prts_core.io.files import read_json, write_json
from prts_core.policy.observation import STATE
from prts_core.policy.policy import load_policy
from prts_core.policy.processor import load_compat
from prts_core.release.policy import import_released
from prts_core.text import prompt
from tests.fixtures.released import CAMERAS, WIDTH, needs_case, write_checkpoint, write_fast


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "released")


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    return write_fast(tmp_path / "fast")


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
    noise = torch.randn(
        contract.chunk_length, policy.model.config.max_action_dim, generator=torch.Generator().manual_seed(7)
    )[None]
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


@needs_case
def test_golden_the_command_imports_and_says_what_it_made(
    checkpoint: Path, fast: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robots, out = tmp_path / "robots", tmp_path / "policy"
    robots.mkdir()
    (robots / "arm.yaml").write_text(
        "embodiment_tag: arm\ntruncate: true\nrelative: [true, true, true, true, false, true]\n"
    )
    command = ["import-policy", str(checkpoint), "--fast", str(fast), "--robot", "arm", "--robots", str(robots)]
    command += ["--out", str(out), "--view-tokens", "4", "9", "--hz"]
    assert cli.main([*command, "0"]) == 1 and "above 0" in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, "20", "--dataset", "no/such"]) == 1 and not out.exists()
    assert cli.main([*command, "20", "--state-relative"]) == 0
    told = capsys.readouterr().out
    assert "arm, 20 Hz, MIN_MAX" in told and f"x {WIDTH}, 4 relative" in told and "called 'Camera top'" in told
    policy = load_policy(out)
    assert policy.processor.compat == "prts" and policy.contract.contract.relative == (True, True, True, True, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "policy", "released", "robots"]
    assert cli.main([*command, "20"]) == 1 and "something at this place" in capsys.readouterr().err
