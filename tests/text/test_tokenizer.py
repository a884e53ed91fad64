"""Qwen's own tokenizer files, and the tokens PRTS adds to them in the released order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prts_core.io.errors import CheckpointError
from prts_core.text import prompt
from prts_core.text.tokenizer import TextTokenizer, read_tokenizer, with_prts_tokens

TEXT = "Instruction: Open the drawer.\nPredict 12"


def byte_level() -> Tokenizer:
    """A small byte-level BPE, as Qwen's is a large one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["open the drawer", "the instruction", "predict"] * 5, trainer)
    return tokenizer


def qwen_folder(folder: Path) -> Path:
    """vocab.json and merges.txt, the control tokens in tokenizer_config.json: the checkpoint's older form."""
    tokenizer = byte_level()
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {str(first + i): {"content": token} | flags for i, token in enumerate(prompt.CONTROL_TOKENS)}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_prts_tokens_follow_in_the_released_order(tmp_path: Path) -> None:
    plain = read_tokenizer(qwen_folder(tmp_path))
    size = plain.get_vocab_size()
    made = with_prts_tokens(plain, 16)
    order = [prompt.ACTION_START, prompt.ACTION_PAD, prompt.ACTION_END, prompt.GOAL, prompt.OBS]
    assert [made.id(token) for token in order] == list(range(size, size + 5))
    assert (made.fast_base, made.fast_size, len(made)) == (size + 5, 16, size + 21)
    text = f"{prompt.IM_START}user\n{TEXT}{prompt.GOAL}{prompt.fast_token(3)}"
    ids = made.encode(text)
    assert made.tokenizer.decode(ids, skip_special_tokens=False) == text and made.fast_base + 3 == ids[-1]


def test_a_checkpoint_folder_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    made = with_prts_tokens(read_tokenizer(qwen_folder(tmp_path / "qwen")), 4)
    made.save(tmp_path / "tokenizer.json")
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        again = TextTokenizer.load(where)
        assert again.encode(TEXT + prompt.OBS) == made.encode(TEXT + prompt.OBS) and len(again) == len(made)
    same = with_prts_tokens(read_tokenizer(tmp_path), 4)
    assert len(same) == len(made), "tokens that are there are not added again"
    with pytest.raises(CheckpointError, match="another FAST vocabulary"):
        with_prts_tokens(read_tokenizer(tmp_path), 3)


def test_qwen_s_own_splitting_is_kept(tmp_path: Path) -> None:
    """Single digits, and a full stop with the line break behind it: what the released prompts were cut into."""
    tokens = read_tokenizer(qwen_folder(tmp_path)).encode("12.\nA").tokens
    assert tokens[:2] == ["1", "2"]
    pieces = read_tokenizer(tmp_path).pre_tokenizer.pre_tokenize_str("drawer.\nPredict 12")
    assert [piece for piece, _ in pieces] == ["drawer", ".Ċ", "Predict", "Ġ", "1", "2"]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no vocab\.json and no merges\.txt"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextTokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="lacks control tokens"):
        TextTokenizer.load(tmp_path)


def test_scattered_fast_tokens_are_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([*prompt.CONTROL_TOKENS, prompt.fast_token(0)])
    with pytest.raises(CheckpointError, match="no consecutive ids"):
        with_prts_tokens(tokenizer, 3)
