"""The way back to the public release: what was read from its layout is written again to the bit, and acts alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prts_core.cli import main as cli
from prts_core.config.model import DitConfig, ModelConfig, MotConfig, TokensConfig
from prts_core.data.release_statistics import read_statistics
from prts_core.io.errors import CheckpointError
from prts_core.io.files import read_json
from prts_core.io.tensors import load_sharded
from prts_core.policy.observation import STATE
from prts_core.policy.policy import load_policy, save_policy
from prts_core.release.checkpoint import read_released
from prts_core.release.export import export_policy, fixed_sizes, release_config
from prts_core.release.policy import import_released
from prts_core.text.tokenizer import read_tokenizer, with_prts_tokens
from tests.fixtures.released import CAMERAS, CASE, needs_case, write_checkpoint, write_fast, write_tokenizer
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy

HOW = {"control_hz": 20, "embodiment_tag": "libero_panda", "view_tokens": (4, 9)}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "released")


@pytest.fixture
def imported(tmp_path: Path, released: Path) -> Path:
    import_released(released, tmp_path / "policy", fast=write_fast(tmp_path / "fast"), **HOW)  # type: ignore[arg-type]
    return tmp_path / "policy"


def seen() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (32, 48, 3), dtype=np.uint8) for key in CAMERAS}
    return images | {STATE: np.array([0.5, 0.5, -3.0], np.float32)}


@needs_case
def test_golden_what_was_read_is_written_again(tmp_path: Path, released: Path, imported: Path) -> None:
    out = tmp_path / "again"
    made = export_policy(imported, out, like=released, dataset="some/robot", overrides=True)
    assert made.acts
    before, after = dict(load_sharded(released)), dict(load_sharded(out))
    assert before.keys() == after.keys()
    kept = read_released(released).weights  # norms as the public code itself keeps them
    assert all(torch.equal(after[name], kept[name]) and after[name].dtype == before[name].dtype for name in before)
    assert read_json(out / "config.json") == read_json(released / "config.json")
    theirs, ours = read_statistics(released / "statistics.json"), read_statistics(out / "statistics.json")
    assert ours.state_mode == theirs.state_mode and list(ours.datasets) == ["some/robot"]
    for key, stats in theirs.dataset().stats.items():
        assert ours.dataset().stats[key].to_json() == stats.to_json()
    assert [key for key in ours.dataset().features if key in CAMERAS] == list(CAMERAS)


@needs_case
def test_golden_a_policy_that_went_out_and_came_back_acts_to_the_bit(tmp_path: Path, imported: Path) -> None:
    own = load_policy(imported)
    with torch.no_grad():  # as if it had been trained on
        for name, parameter in own.model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.add_(0.01 * torch.randn_like(parameter))
    trained = tmp_path / "trained"
    save_policy(trained, own.model.state_dict(), own.model.config, own.processor)
    made = export_policy(trained, tmp_path / "out", overrides=True, max_shard_bytes=200_000)
    assert made.rounded == 0.0 and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    back = import_released(tmp_path / "out", tmp_path / "back", fast=tmp_path / "out" / "fast", **HOW)  # type: ignore[arg-type]
    assert np.array_equal(own.act(seen(), "close the door", 7), back.act(seen(), "close the door", 7))
    assert back.processor.fast.vocab_size == own.processor.fast.vocab_size


@needs_case
def test_golden_norms_that_bf16_cannot_hold_are_rounded_and_told(tmp_path: Path, imported: Path, capsys) -> None:
    own = load_policy(imported)
    own.model.language_model.norm.weight.data.fill_(1.001)
    save_policy(tmp_path / "trained", own.model.state_dict(), own.model.config, own.processor)
    command = ["export-policy", str(tmp_path / "trained"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert "expert.hidden_size 48 (fixed at 1024 in its source)" in capsys.readouterr().err
    assert cli.main([*command, "--overrides", "--dtype", "bf16"]) == 0
    told = capsys.readouterr().out
    assert "a policy" in told and "rounded to bf16" in told and "1.0e-03" in told
    assert {t.dtype for t in load_sharded(tmp_path / "out").values()} == {torch.bfloat16}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert cli.main([*command, "--overrides"]) == 1 and "something at this place" in capsys.readouterr().err


@needs_case
def test_the_checkpoint_it_started_from_may_be_a_hub_id(
    tmp_path: Path, released: Path, imported: Path, monkeypatch
) -> None:
    """Of it only what describes it is fetched, no weights."""
    asked: list[tuple[str, set[str]]] = []

    def downloaded(name: str, *, allow_patterns=(), local_files_only=False, **_) -> str:
        if not local_files_only:
            asked.append((name, set(allow_patterns)))
        return str(released)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloaded)
    command = ["export-policy", str(imported), "--like", "owner/name", "--overrides", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert read_json(tmp_path / "out" / "config.json") == read_json(released / "config.json")
    ((name, patterns),) = asked
    assert name == "owner/name" and {"config.json", "chat_template.jinja"} <= patterns
    assert not any("safetensors" in pattern for pattern in patterns)


def test_a_start_is_found_by_any_name_of_a_policy(tmp_path: Path, monkeypatch) -> None:
    config = replace(MODEL, expert=replace(MODEL.expert, intermediate_size=16))
    policy, asked = write_policy(tmp_path / "policy", config), []
    monkeypatch.setattr("prts_core.delivery.resolve.policy_folder", lambda *given: asked.append(given) or policy)
    command = ["export-policy", "models:/name@champion", "--start", "--overrides", "--outputs", str(tmp_path)]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert asked == [("models:/name@champion", tmp_path)]


@pytest.mark.parametrize("case", ["flow_mot", "flow_dit", "crl_heads", "backbone_forward"])
@needs_case
def test_golden_every_field_of_every_case_comes_back(tmp_path: Path, case: str) -> None:
    """Of a headless one, the action head that its configuration describes comes from the checkpoint it started from."""
    raw = read_json(CASE.parent / case / "config.json")
    found = read_released(CASE.parent / case)
    config = found.config if found.has_action_head else replace(found.config, expert=None)
    write_tokenizer(tmp_path)
    tokenizer = with_prts_tokens(read_tokenizer(tmp_path / "tokenizer.json"), 4)
    embeddings = found.weights["language_model.embed_tokens.weight"]
    assert release_config(config, tokenizer, embeddings, raw) == raw
    bare = release_config(config, tokenizer, embeddings, {})
    unknown = {"auto_map", "embodiment_tag", "text_config"}
    for lacking in (raw.keys() - bare.keys(), {name for name, value in bare.items() if raw.get(name) != value}):
        assert lacking <= unknown
    told = bare["text_config"]
    assert {name for name, value in told.items() if raw["text_config"][name] != value} == {"max_position_embeddings"}


def test_what_the_layout_cannot_hold_is_told_at_once(tmp_path: Path) -> None:
    """Everything that stands in the way, in one error."""
    still = replace(MODEL, expert=replace(MODEL.expert, noise_scale=0.0))
    policy = write_policy(tmp_path / "policy", still)
    with pytest.raises(CheckpointError, match="cannot hold this policy") as told:
        export_policy(policy, tmp_path / "out")
    faults = ("compat none", "letterboxed", "noise_scale 0", "expert.hidden_size 32", "a quarter of the text's, 16")
    for fault in faults:
        assert fault in str(told.value)
    assert not (tmp_path / "out").exists()
    assert fixed_sizes(replace(MODEL, expert=DitConfig(), contrastive=None)) == []
    said = write_policy(tmp_path / "said", replace(MODEL, expert=TokensConfig(bins=16)))
    for kind in ("policy", "start"):
        with pytest.raises(CheckpointError, match="no action head of tokens"):
            export_policy(said, tmp_path / "out", start=kind == "start")


def options(error: CheckpointError) -> dict[str, bool]:
    """Those that the cure names, as export_policy takes them."""
    return {name: True for name in ("start", "overrides") if f"--{name}" in str(error.cure)}


@pytest.mark.parametrize("own", [MODEL, ModelConfig()])
def test_the_options_that_a_refusal_names_cure_it(tmp_path: Path, own: ModelConfig) -> None:
    """No option cures a feed-forward of another size; with the public one, what the cure names is all it takes."""
    config = replace(own, expert=replace(MotConfig(), noise_scale=0.0))
    with pytest.raises(CheckpointError) as told:
        export_policy(write_policy(tmp_path / "a" / "policy", config), tmp_path / "out")
    quarter = config.text.intermediate_size // 4
    assert options(told.value) == {} and f"expert.intermediate_size {quarter}" in str(told.value.cure)
    with pytest.raises(CheckpointError) as told:
        export_policy(tmp_path / "a" / "policy", tmp_path / "out", start=True, overrides=True)
    assert options(told.value) == {} and "noise_scale" not in str(told.value)

    policy = write_policy(
        tmp_path / "b" / "policy", replace(config, expert=replace(config.expert, intermediate_size=quarter))
    )
    for given, named in (
        ({}, {"start", "overrides"}),
        ({"start": True}, {"overrides"}),
        ({"overrides": True}, {"start"}),
    ):
        with pytest.raises(CheckpointError) as told:
            export_policy(policy, tmp_path / "out", **given)
        assert options(told.value).keys() == named
        assert not export_policy(policy, tmp_path / "-".join(named), **given, **options(told.value)).acts


def test_a_start_is_weights_and_tokens_alone(tmp_path: Path) -> None:
    config = replace(MODEL, expert=replace(MODEL.expert, intermediate_size=16), contrastive=None)
    trained = write_policy(tmp_path / "trained", config)
    (trained / "norm_stats.json").unlink()
    made = export_policy(trained, tmp_path / "out", start=True, overrides=True)
    assert not made.acts and not (tmp_path / "out" / "statistics.json").exists()
    found, weights = read_released(tmp_path / "out"), load_sharded(trained)
    assert found.has_action_head and found.vocab_size == len(weights["language_model.embed_tokens.weight"])
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
    assert torch.equal(found.weights["visual.pos_embed.weight"], weights["visual.pos_embed.weight"])
