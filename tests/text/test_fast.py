"""FAST: mixtures of widths and lengths, the published processor's files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prts_core.io.errors import CheckpointError, DataError
from prts_core.text.fast import FastTokenizer


def waves(count: int, length: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, (2, count, 1, width))
    return np.sin(phase + speed / 6 * np.arange(length)[None, :, None])


def test_one_fit_for_chunks_of_many_widths_and_lengths(tmp_path: Path) -> None:
    parts = [waves(120, 8, 7), waves(80, 4, 3, seed=1), waves(0, 5, 2), waves(60, 16, 14, seed=2)]
    fast = FastTokenizer.fit(parts, 512)
    assert fast.vocab_size <= 512
    together = fast.encode_many(parts)
    assert together == [tokens for part in parts for tokens in fast.encode_many(part)]
    for part in (parts[0], parts[1], parts[3]):
        length, width = part.shape[1:]
        tokens = fast.encode_many(part)
        assert np.mean([len(t) for t in tokens]) < 0.7 * length * width, "merged pairs make it shorter"
        # The transform is orthonormal: rounding costs 1 / (scale * sqrt(12)) a number, less where most are nearly 0.
        rounding = 1 / fast.scale / np.sqrt(12)
        assert 0.5 * rounding < fast.round_trip_error(part) < 1.1 * rounding
    fast.save(tmp_path / "fast.json")
    assert FastTokenizer.load(tmp_path / "fast.json").encode_many(parts) == together


def test_fit_without_chunks_is_refused() -> None:
    with pytest.raises(DataError, match="without action chunks"):
        FastTokenizer.fit([np.zeros((0, 4, 2))], 64)


def test_the_published_form_round_trips_and_reserves_its_vocabulary(tmp_path: Path) -> None:
    chunks = waves(200, 6, 4)
    made = FastTokenizer.fit(chunks, 600, compat="prts")
    assert made.vocab_size == 600 >= made.bpe.get_vocab_size()
    settings = {"scale": made.scale, "min_token": made.min_token, "vocab_size": 600, "action_dim": None}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoProcessor": "x.Y"}}))
    made.bpe.save(str(tmp_path / "tokenizer.json"))
    for compat in ("none", "prts"):
        read = FastTokenizer.from_published(tmp_path, compat)  # type: ignore[arg-type]
        assert read.encode_many(chunks) == made.encode_many(chunks) and read.compat == compat
        assert read.round_trip_error(chunks) < 0.05
    assert FastTokenizer.from_published(str(tmp_path)).vocab_size == 600


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("processor_config.json", None, "holds no FAST processor"),
        ("tokenizer.json", None, "file is missing"),
        ("processor_config.json", {"scale": 10}, "min_token"),
        ("processor_config.json", {"scale": 0, "min_token": -5}, "scale"),
        ("processor_config.json", {"scale": 10, "min_token": -5, "vocab_size": 3}, "smaller than its own BPE"),
        ("processor_config.json", [1], "malformed"),
        ("tokenizer.json", {"model": "?"}, "malformed"),
    ],
)
def test_damaged_published_files_are_named(tmp_path: Path, name: str, change: object, message: str) -> None:
    made = FastTokenizer.fit(waves(50, 4, 3), 128, compat="prts")
    (tmp_path / "processor_config.json").write_text(json.dumps({"scale": 10, "min_token": made.min_token}))
    made.bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).unlink()
    if change is not None:
        (tmp_path / name).write_text(json.dumps(change))
    with pytest.raises((CheckpointError, DataError), match=message) as caught:
        FastTokenizer.from_published(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(CheckpointError, match="neither a folder here nor can it be fetched"):
        FastTokenizer.from_published("no/such-processor")
