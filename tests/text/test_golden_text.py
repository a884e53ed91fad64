"""Every text of the golden case `normalize` under compat "prts"; the corrected words under "none" are in test_text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prts_core.config.model import Compat
from prts_core.config.places import shared_folder
from prts_core.data.embodiment import camera_label
from prts_core.data.goals import Stretch
from prts_core.data.normalize import normalize_for_fast
from prts_core.data.release_statistics import read_statistics
from prts_core.io.errors import DataError
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.sequence import IGNORE, ImageTokens, Sample, SequenceBuilder
from prts_core.text.tokenizer import TextTokenizer, with_prts_tokens
from prts_core.training.batch import chunk_windows, pad_chunk

CASE = shared_folder() / "golden" / "prts" / "normalize"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"golden case {CASE.name} is not on this machine")
COVERED = {
    "instruction_cleaning",
    "crl_task_ids",
    "chunk_indices",
    "training_prompts",
    "camera_names",
    "state_to_text",
    "inference_prompt",
    "inference_prompt_crl_markers",
    "inference_prompt_no_state",
    "fast_tokens",
    "fast_tokenizer",
    "fast_bad_token_decode_is_zeros",
    "rope_index_3_equals_model_get_rope_index",
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    return json.loads((CASE / "text_cases.json").read_text())


@pytest.fixture(scope="module")
def released_fast(cases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    return published(cases, tmp_path_factory.mktemp("fast"), "prts")


def published(cases: dict[str, Any], folder: Path, compat: Compat) -> FastTokenizer:
    """The case's BPE as the published processor would lie on disk."""
    settings = {name: cases["fast_tokenizer"][name] for name in ("scale", "vocab_size", "min_token")}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"time_horizon": None, "action_dim": None}))
    (folder / "tokenizer.json").write_bytes((CASE / "fast_tokenizer.json").read_bytes())
    return FastTokenizer.from_published(folder, compat)


def byte_tokenizer(fast_size: int) -> TextTokenizer:
    """One token a byte and Qwen's control tokens: what the case's lengths were counted with."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(prompt.CONTROL_TOKENS))
    return with_prts_tokens(tokenizer, fast_size)


def numbers(values: list[Any]) -> list[float]:
    return [float(v) for v in values]  # "inf" is written as text


def parsed(text: str) -> tuple[list[str], list[int] | None, str]:
    """(camera labels, integers of the state or none, instruction) of a prompt."""
    labels = re.findall(r"^(?:<\|im_start\|>user\n)?(.+): <\|vision_start\|>", text, re.MULTILINE)
    state = re.search(r"scale\): ([-\d ]+)\n", text)
    instruction = re.search(rf"{prompt.INSTRUCTION_INTRO}(.*?)(?:<\|goal_repr\|>)?\nPredict", text)
    assert labels and instruction
    return labels, [int(i) for i in state.group(1).split()] if state else None, instruction.group(1)


def full_prompt(labels: list[str], bins: list[int] | None, instruction: str, markers: bool) -> str:
    state = None if bins is None else np.array(bins)
    return (
        prompt.head_text(tuple(labels), (1,) * len(labels))
        + prompt.state_text(state, markers)
        + prompt.instruction_text(instruction, markers, "prts")
        + prompt.tail_text()
    )


@needs_case
def test_golden_every_entry_is_covered(cases: dict[str, Any]) -> None:
    assert set(cases) == COVERED


@needs_case
def test_golden_instructions(cases: dict[str, Any]) -> None:
    for case in cases["instruction_cleaning"]:
        ours = prompt.clean_instruction(case["input"], case["episode_tasks_0"], compat="prts")
        assert ours == case["output"], case


@needs_case
def test_golden_task_ids(cases: dict[str, Any]) -> None:
    for case in cases["crl_task_ids"]:
        assert prompt.task_id(case["input"], "prts") == case["task_id"], case


@needs_case
def test_golden_camera_names(cases: dict[str, Any]) -> None:
    for case in cases["camera_names"]:
        assert camera_label(case["input"], "prts") == case["output"], case
        assert camera_label(f"observation.images.{case['input']}", "prts") == case["output"], case


@needs_case
def test_golden_chunks(cases: dict[str, Any]) -> None:
    for case in cases["chunk_indices"]:
        rows = np.arange(case["episode_len"])[:, None]
        windows, is_pad = chunk_windows(rows, case["horizon"])
        assert windows[case["idx"], :, 0].tolist() == case["query"], case
        assert is_pad[case["idx"]].tolist() == [bool(p) for p in case["is_pad"]], case
        whole = Stretch(0, case["episode_len"], "", case["episode_len"] - 1)
        assert whole.steps_to_go()[case["idx"]] == case["steps_to_go"], case


@needs_case
def test_golden_states_as_text(cases: dict[str, Any]) -> None:
    refused = 0
    for case in cases["state_to_text"]:
        state = torch.tensor(numbers(case["normalized_state"])).to(getattr(torch, case["dtype"]))
        finite = torch.isfinite(state)
        if not finite.all():
            with pytest.raises(DataError, match="not finite"):
                prompt.state_bins(state, "prts")
            refused += 1
        wanted = np.array(case["text"].split())[finite.numpy()].tolist()
        bins = prompt.state_bins(state[finite], "prts")
        assert prompt.state_text(bins, markers=False).removeprefix(prompt.STATE_INTRO).split() == wanted, case
    assert refused, "the case holds a state that is not finite"


@needs_case
@pytest.mark.parametrize(
    ("name", "markers"),
    [("inference_prompt", False), ("inference_prompt_crl_markers", True), ("inference_prompt_no_state", False)],
)
def test_golden_inference_prompts(cases: dict[str, Any], name: str, markers: bool) -> None:
    case = cases[name]
    wanted = case if isinstance(case, str) else case["text"]
    assert prompt.has_markers(markers, "prts") == markers == (prompt.OBS in wanted) == (prompt.GOAL in wanted)
    assert full_prompt(*parsed(wanted), markers) == wanted
    if not isinstance(case, str):
        _, steps, width = case["action_dof_mask_shape"]
        real = round(case["action_dof_mask_sum"] / steps)
        assert pad_chunk(np.zeros((steps, real)), width)[1].sum() == case["action_dof_mask_sum"]


@needs_case
def test_golden_training_prompts(cases: dict[str, Any], released_fast: FastTokenizer) -> None:
    """Words, token counts, positions, labels, FAST tokens and chunk flags of whole samples, through SequenceBuilder."""
    tokenizer = byte_tokenizer(released_fast.vocab_size)
    given = load_file(CASE / "inputs.safetensors")
    action = read_statistics(CASE / "statistics_quantile.json").dataset().norm_stats().action
    for case in cases["training_prompts"]:
        system, user, answer = case["texts_in_order"]
        labels, _, instruction = parsed(user)
        bins = prompt.state_bins(np.array(case["state_normalized"], np.float32), "prts")
        assert full_prompt(labels, bins.tolist(), instruction, prompt.has_markers(False, "prts")) == system + user
        steps, width = case["actions_shape"][1:]
        windows, is_pad = chunk_windows(given["action"], steps)
        assert is_pad[case["frame"]].tolist() == [bool(p) for p in case["action_is_pad"][0]]
        assert pad_chunk(windows[case["frame"]], width)[0].shape == (steps, width)
        pretraining = case["phase"] == "pre-training"
        fast = None
        if pretraining:
            chunk = normalize_for_fast(windows[case["frame"]][None], action, "QUANTILE", "prts")
            (fast,) = released_fast.encode_many(chunk)
            assert fast == case["fast_token_ids"]
            shown = prompt.ACTION_START + "".join(map(prompt.fast_token, fast)) + prompt.ACTION_END
            assert f"{shown}{prompt.IM_END}\n" == answer
        else:
            assert answer == "" and case["fast_token_ids"] is None
        # How many tokens an image takes is the file's to say.
        text = len(tokenizer.encode(system + user + answer)) - len(labels)
        side = math.isqrt((case["input_ids_len"] - text) // len(labels))
        builder = SequenceBuilder(tokenizer, tuple(ImageTokens(label, side, side) for label in labels), "prts")
        (state,) = builder.encode_states(bins[None])
        made = builder.sequence(Sample(state, instruction, fast), response=pretraining, contrastive=False)
        expanded = (system + user + answer).replace(prompt.IMAGE_PAD, prompt.IMAGE_PAD * side**2)
        assert made.ids.tolist() == tokenizer.encode(expanded)
        assert len(made) == case["input_ids_len"] == case["seq_length"]
        assert int(made.positions.max()) == case["position_ids_max"]
        assert int((made.labels != IGNORE).sum()) == case["num_label_positions"]
        assert made.state_action_index == made.goal_index == -1


@needs_case
def test_golden_contrastive_parts_bring_the_markers(cases: dict[str, Any], released_fast: FastTokenizer) -> None:
    """The case shows no contrastive sequence; the blocks and positions are those of the public data code (facts)."""
    tokenizer = byte_tokenizer(released_fast.vocab_size)
    case = next(c for c in cases["training_prompts"] if c["fast_token_ids"])
    labels, bins, instruction = parsed(case["texts_in_order"][1])
    builder = SequenceBuilder(tokenizer, tuple(ImageTokens(label, 2, 2) for label in labels), "prts")
    (state,) = builder.encode_states(np.array([bins]))
    made = builder.sequence(Sample(state, instruction, case["fast_token_ids"]), response=True, contrastive=True)
    text = tokenizer.tokenizer.decode(made.ids.tolist(), skip_special_tokens=False)
    base = full_prompt(labels, bins, instruction, True).replace(prompt.IMAGE_PAD, prompt.IMAGE_PAD * 4)
    answer = case["texts_in_order"][2]
    copy = answer.removesuffix(prompt.IM_END + "\n")
    assert text == base + answer + copy + prompt.instruction_text(instruction, True, "prts")
    bc_end, action_end = made.ends[1:3]
    size = action_end - bc_end
    assert (made.positions[:, bc_end:action_end] == made.positions[:, made.prompt_end : made.prompt_end + size]).all()
    assert made.positions[0, action_end] == 0 and (made.labels[bc_end:] == IGNORE).all()
    assert tokenizer.tokenizer.id_to_token(int(made.ids[made.state_action_index])) == prompt.ACTION_END
    assert tokenizer.tokenizer.id_to_token(int(made.ids[made.goal_index])) == prompt.GOAL


@needs_case
def test_golden_fast_tokens(cases: dict[str, Any], released_fast: FastTokenizer) -> None:
    chunks = load_file(CASE / "inputs.safetensors")["fast_chunks"]
    settings = cases["fast_tokenizer"]
    found = (released_fast.scale, released_fast.vocab_size, released_fast.min_token)
    assert found == (settings["scale"], settings["vocab_size"], settings["min_token"])
    for chunk, case, tokens in zip(chunks, cases["fast_tokens"], released_fast.encode_many(chunks), strict=True):
        assert tokens == case["tokens"]
        error = np.abs(released_fast.decode(tokens, *chunk.shape) - chunk).max()
        assert error == pytest.approx(case["decoded_max_abs_err"], rel=1e-6)


@needs_case
def test_golden_tokens_that_are_no_chunk(cases: dict[str, Any], released_fast: FastTokenizer, tmp_path: Path) -> None:
    assert cases["fast_bad_token_decode_is_zeros"] is True
    bad = cases["fast_tokens"][0]["tokens"][:-1]
    length, width = load_file(CASE / "inputs.safetensors")["fast_chunks"].shape[1:]
    assert (released_fast.decode(bad, length, width) == 0).all()
    with pytest.raises(DataError, match="whole chunk"):
        published(cases, tmp_path, "none").decode(bad, length, width)


@needs_case
def test_golden_dataset_side_positions_are_the_model_s(cases: dict[str, Any]) -> None:
    """The release's second implementation of M-RoPE agrees with the model's; so must ours, with transformers' own."""
    from transformers.models.qwen3_vl import Qwen3VLConfig, Qwen3VLModel

    assert cases["rope_index_3_equals_model_get_rope_index"] is True
    tokenizer = byte_tokenizer(4)
    views = (ImageTokens("Camera top", 4, 4), ImageTokens("Camera wrist", 2, 6))
    builder = SequenceBuilder(tokenizer, views, "prts")
    (state,) = builder.encode_states(np.array([[1, 2, 3]]))
    made = builder.sequence(Sample(state, "open it"), response=False, contrastive=False)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "deepstack_visual_indexes": []}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
        "vocab_size": len(tokenizer),
    }
    config = Qwen3VLConfig(
        vision_config=vision | {"out_hidden_size": 16},
        text_config=text,
        image_token_id=tokenizer.id(prompt.IMAGE_PAD),
        video_token_id=tokenizer.id("<|video_pad|>"),
        vision_start_token_id=tokenizer.id(prompt.VISION_START),
    )
    ids = torch.from_numpy(made.ids)[None]
    grid = torch.tensor([[1, v.rows * 2, v.columns * 2] for v in views])
    kind = (ids == config.image_token_id).int()
    with torch.device("meta"):
        model = Qwen3VLModel(config)
    wanted, _ = model.get_rope_index(ids, kind, image_grid_thw=grid, attention_mask=torch.ones_like(ids))
    np.testing.assert_array_equal(made.positions, wanted[:, 0].numpy())
