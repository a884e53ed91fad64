"""FAST action tokens: orthonormal DCT over time, rounding, byte-pair encoding of the coefficients.

Source: FAST (arXiv:2501.09747). `prompt.fast_token` maps an index to its token. Fitted on our own data the BPE merges
coefficients themselves. The published one (`physical-intelligence/fast`, read by `from_published` without running its
code) merges the UTF-8 bytes of coefficients written as characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prts_core.config.model import Compat
from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import read_json, write_text
from prts_core.io.hub import local_folder

CLAMP = 50.0  # normalised actions beyond this are cut, so that one outlier cannot blow up the vocabulary
SCALE = 10.0
_HIGHEST = 4096  # coefficients of clamped chunks span less than this, and so do the characters worth probing
_PUBLISHED = ("processor_config.json", "preprocessor_config.json")


@lru_cache(maxsize=64)
def dct_matrix(length: int) -> np.ndarray:
    """(length, length) orthonormal DCT-II; its transpose inverts it."""
    k, n = np.arange(length)[:, None], np.arange(length)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * length)) * np.sqrt(2.0 / length)
    matrix[0] /= np.sqrt(2.0)
    return matrix


class FastTokenizer:
    """Chunks (T, D) of normalised actions <-> lists of token indices in [0, vocab_size); T and D are free.

    vocab_size: how many tokens the text tokenizer reserves, at least the BPE's own. compat "prts": coefficients that
    the vocabulary cannot write are left to it (they vanish), and tokens that are no chunk decode to zeros, as in the
    public release; otherwise the nearest writable coefficient is written, and such tokens are refused.
    """

    def __init__(
        self,
        bpe: Tokenizer,
        min_token: int,
        scale: float = SCALE,
        vocab_size: int | None = None,
        compat: Compat = "none",
    ) -> None:
        own = bpe.get_vocab_size()
        self.bpe, self.min_token, self.scale, self.compat = bpe, min_token, scale, compat
        self.vocab_size = own if vocab_size is None else vocab_size
        if self.vocab_size < own:
            raise CheckpointError(
                "A FAST vocabulary is smaller than its own BPE",
                field="vocab_size",
                found=self.vocab_size,
                expected=f"at least {own}",
            )
        probes = [chr(i) for i in range(max(_HIGHEST, own))]
        encoded = bpe.encode_batch(probes, add_special_tokens=False)
        writable = [i for i, e in enumerate(encoded) if self._text(e.ids) == probes[i]]
        if not writable:
            raise CheckpointError("A FAST vocabulary writes no coefficient at all", field="bpe")
        self.writable = np.array(writable) + min_token  # coefficients, rising

    def _text(self, ids: list[int]) -> str:
        if self.bpe.decoder is None:  # merges of characters: a token is its own text
            return "".join(self.bpe.id_to_token(i) or "" for i in ids)
        return self.bpe.decode(ids, skip_special_tokens=False)

    @staticmethod
    def fit(
        chunks: np.ndarray | Sequence[np.ndarray], vocab_size: int, scale: float = SCALE, compat: Compat = "none"
    ) -> FastTokenizer:
        """chunks: normalised (N, T, D), or a list of such arrays, whose lengths and widths may differ (a mixture of
        embodiments; each chunk is flattened its own way). compat "prts": the published procedure, to the token.

        Raises DataError when there is no chunk or the coefficients alone need more than `vocab_size`.
        """
        parts = [dct_coefficients(c, scale) for c in _arrays(chunks) if len(c)]
        if not parts:
            raise DataError("FAST cannot be fitted without action chunks", field="action", found="no chunk")
        low, high = min(int(p.min()) for p in parts), max(int(p.max()) for p in parts)
        if high - low + 1 > vocab_size:
            raise DataError(
                "The action coefficients span more values than the FAST vocabulary holds",
                field="fast_vocab_size",
                found=high - low + 1,
                expected=f"at most {vocab_size}",
                cure="raise fast_vocab_size, or look at the norm statistics: outliers stretch the range",
            )
        bpe = Tokenizer(models.BPE())
        if compat == "prts":
            bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            max_token_length=10_000,
            special_tokens=[],
            initial_alphabet=[chr(i) for i in range(high - low + 1)],
        )
        bpe.train_from_iterator((_write(chunk - low) for part in parts for chunk in part), trainer)
        return FastTokenizer(bpe, low, scale, vocab_size if compat == "prts" else None, compat)

    def encode_many(self, chunks: np.ndarray | Sequence[np.ndarray]) -> list[list[int]]:
        """(N, T, D), or a list of such arrays -> the token indices of every chunk, in order."""
        texts = []
        for part in _arrays(chunks):
            coefficients = dct_coefficients(part, self.scale)
            offsets = (self._nearest(coefficients) if self.compat == "none" else coefficients) - self.min_token
            texts += [_write(chunk) for chunk in offsets.clip(min=0)]
        return [encoding.ids for encoding in self.bpe.encode_batch(texts, add_special_tokens=False)]

    def _nearest(self, coefficients: np.ndarray) -> np.ndarray:
        """Each coefficient, or the nearest one that the vocabulary can write."""
        between = (self.writable[1:] + self.writable[:-1]) / 2
        return self.writable[np.searchsorted(between, coefficients)]

    def decode(self, ids: list[int], length: int, width: int) -> np.ndarray:
        """Token indices -> (length, width) normalised chunk. Raises DataError when they are not a whole chunk."""
        text = self._text([int(i) for i in ids])
        if len(text) != length * width:
            if self.compat == "prts":
                return np.zeros((length, width))
            raise DataError(
                "FAST tokens do not decode to a whole chunk", found=f"{len(text)} coefficients", expected=length * width
            )
        coefficients = np.array([ord(c) for c in text], np.float64).reshape(length, width) + self.min_token
        return dct_matrix(length).T @ (coefficients / self.scale)

    def round_trip_error(self, chunks: np.ndarray) -> float:
        """Root mean square error of decode(encode(x)) over chunks (N, T, D), in normalised units."""
        back = np.stack([self.decode(t, *chunks.shape[1:]) for t in self.encode_many(chunks)])
        return float(np.sqrt(np.mean((back - chunks) ** 2)))

    def save(self, path: Path) -> None:
        record = {
            "min_token": self.min_token,
            "scale": self.scale,
            "vocab_size": self.vocab_size,
            "bpe": json.loads(self.bpe.to_str()),
        }
        write_text(path, json.dumps(record, ensure_ascii=True, indent=1))

    @staticmethod
    def load(path: Path, compat: Compat = "none") -> FastTokenizer:
        """A file that `save` wrote."""
        return _read(read_json(path), path, compat)

    @staticmethod
    def from_published(where: str | Path, compat: Compat = "none") -> FastTokenizer:
        """The files of a published FAST processor, a folder or a hub id: tokenizer.json beside processor_config.json or
        preprocessor_config.json. Nothing of the folder is executed, whatever its `auto_map` says.

        Raises CheckpointError where a file is missing or malformed.
        """
        folder = local_folder(where, ["tokenizer.json", *_PUBLISHED])
        settings = next((folder / name for name in _PUBLISHED if (folder / name).is_file()), None)
        if settings is None:
            raise CheckpointError(
                "A folder holds no FAST processor",
                file=folder,
                expected=" or ".join(_PUBLISHED),
                cure="name the folder (or hub id) that the processor was saved to",
            )
        record = read_json(settings)
        if isinstance(record, dict):
            record = record | {"bpe": read_json(folder / "tokenizer.json")}
        return _read(record, settings, compat)


def _read(raw: dict, path: Path, compat: Compat) -> FastTokenizer:
    try:
        bpe = Tokenizer.from_str(json.dumps(raw["bpe"]))
        vocab_size = raw.get("vocab_size")
        scale = float(raw["scale"])
        if not scale > 0:
            raise ValueError(f"scale is {scale}")
        return FastTokenizer(bpe, int(raw["min_token"]), scale, None if vocab_size is None else int(vocab_size), compat)
    except CheckpointError as err:
        raise CheckpointError(err.problem, file=path, field=err.field, found=err.found, expected=err.expected) from err
    except Exception as err:  # the tokenizers package raises bare Exception for malformed files
        raise CheckpointError(
            "A FAST tokenizer file is malformed",
            file=path,
            found=f"{type(err).__name__}: {err}",
            cure="restore it from its source",
        ) from err


def _arrays(chunks: np.ndarray | Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    return [chunks] if isinstance(chunks, np.ndarray) else chunks


def _write(offsets: np.ndarray) -> str:
    """A chunk's coefficients (T, D), counted from the lowest, as characters: all of the lowest frequency first."""
    return "".join(map(chr, offsets.ravel()))


def dct_coefficients(chunks: np.ndarray, scale: float) -> np.ndarray:
    """(N, T, D) -> rounded DCT coefficients (N, T, D), lowest frequency first."""
    if chunks.ndim != 3 or not np.isfinite(chunks).all():
        raise DataError("Action chunks must be finite and (N, T, D)", field="action", found=str(chunks.shape))
    return np.rint(np.einsum("kt,ntd->nkd", dct_matrix(chunks.shape[1]), chunks.clip(-CLAMP, CLAMP)) * scale).astype(
        np.int64
    )
