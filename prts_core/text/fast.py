"""FAST action tokens: orthonormal DCT over time, rounding, byte-pair encoding of the coefficients.

Source: FAST (arXiv:2501.09747). It does not know the text tokenizer; `prompt.fast_token` maps an index to its token.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, trainers

from prts_core.errors import CheckpointError, DataError
from prts_core.files import read_json, write_text

CLAMP = 50.0  # normalised actions beyond this are cut, so that one outlier cannot blow up the vocabulary
SCALE = 10.0


@lru_cache(maxsize=8)
def dct_matrix(length: int) -> np.ndarray:
    """(length, length) orthonormal DCT-II; its transpose inverts it."""
    k, n = np.arange(length)[:, None], np.arange(length)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * length)) * np.sqrt(2.0 / length)
    matrix[0] /= np.sqrt(2.0)
    return matrix


class FastTokenizer:
    """Chunks (T, D) of quantile-normalised actions <-> lists of token indices in [0, vocab_size)."""

    def __init__(self, bpe: Tokenizer, min_token: int, max_token: int, scale: float = SCALE) -> None:
        self.bpe, self.min_token, self.max_token, self.scale = bpe, min_token, max_token, scale

    @property
    def vocab_size(self) -> int:
        return self.bpe.get_vocab_size()

    @staticmethod
    def fit(chunks: np.ndarray, vocab_size: int, scale: float = SCALE) -> FastTokenizer:
        """chunks (N, T, D) normalised. Raises DataError when the coefficients alone need more than `vocab_size`."""
        coefficients = _coefficients(chunks, scale)
        low, high = int(coefficients.min()), int(coefficients.max())
        if high - low + 1 > vocab_size:
            raise DataError(
                "The action coefficients span more values than the FAST vocabulary holds",
                field="fast_vocab_size", found=high - low + 1, expected=f"at most {vocab_size}",
                cure="raise fast_vocab_size, or look at the norm statistics: outliers stretch the range",
            )  # fmt: skip
        texts = ["".join(map(chr, row)) for row in coefficients.reshape(len(chunks), -1) - low]
        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, max_token_length=10_000,
            initial_alphabet=[chr(i) for i in range(high - low + 1)],
        )  # fmt: skip
        bpe.train_from_iterator(texts, trainer)
        return FastTokenizer(bpe, low, high, scale)

    def encode_many(self, chunks: np.ndarray) -> list[list[int]]:
        """(N, T, D) -> N lists of token indices. Coefficients outside the fitted range are cut to it."""
        clipped = _coefficients(chunks, self.scale).clip(self.min_token, self.max_token) - self.min_token
        texts = ["".join(map(chr, row)) for row in clipped.reshape(len(chunks), -1)]
        return [encoding.ids for encoding in self.bpe.encode_batch(texts)]

    def decode(self, ids: list[int], length: int, width: int) -> np.ndarray:
        """Token indices -> (length, width) normalised chunk. Raises DataError when they are not a whole chunk."""
        text = "".join(self.bpe.id_to_token(i) or "" for i in ids)
        if len(text) != length * width:
            raise DataError(
                "FAST tokens do not decode to a whole chunk", found=f"{len(text)} coefficients", expected=length * width
            )
        coefficients = np.array([ord(c) for c in text], np.float64).reshape(length, width) + self.min_token
        return dct_matrix(length).T @ (coefficients / self.scale)

    def round_trip_error(self, chunks: np.ndarray) -> float:
        """Root mean square error of decode(encode(x)) in normalised units."""
        tokens = self.encode_many(chunks)
        back = np.stack([self.decode(t, *chunks.shape[1:]) for t in tokens])
        return float(np.sqrt(np.mean((back - chunks) ** 2)))

    def save(self, path: Path) -> None:
        record = {
            "min_token": self.min_token,
            "max_token": self.max_token,
            "scale": self.scale,
            "bpe": json.loads(self.bpe.to_str()),
        }
        write_text(path, json.dumps(record, ensure_ascii=True, indent=1))

    @staticmethod
    def load(path: Path) -> FastTokenizer:
        raw = read_json(path)
        try:
            bpe = Tokenizer.from_str(json.dumps(raw["bpe"]))
            return FastTokenizer(bpe, int(raw["min_token"]), int(raw["max_token"]), float(raw["scale"]))
        except (KeyError, TypeError, ValueError) as err:
            raise CheckpointError(
                "A FAST tokenizer file is malformed", file=path, found=f"{type(err).__name__}: {err}"
            ) from err


def _coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    """(N, T, D) -> rounded DCT coefficients (N, T, D), lowest frequency first."""
    if chunks.ndim != 3 or not np.isfinite(chunks).all():
        raise DataError("Action chunks must be finite and (N, T, D)", field="action", found=str(chunks.shape))
    return np.rint(np.einsum("kt,ntd->nkd", dct_matrix(chunks.shape[1]), chunks.clip(-CLAMP, CLAMP)) * scale).astype(
        np.int64
    )
