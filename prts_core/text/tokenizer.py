"""Text tokenizer: Qwen's own loaded from a folder or hub id, or a small one trained on the sentences at hand.

The small one keeps what matters of Qwen's: byte-level BPE, the same control tokens. The prompt's fixed phrases and the
integers 0 to 1000 are single tokens, so that a sample stays short on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.hub import local_folder
from prts_core.text import prompt

_QWEN_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")


class TextTokenizer:
    """A `tokenizers.Tokenizer` with the ids PRTS needs by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        missing = [t for t in (*prompt.CONTROL_TOKENS, *prompt.PRTS_TOKENS) if tokenizer.token_to_id(t) is None]
        if missing:
            raise CheckpointError(
                "The tokenizer lacks control tokens",
                found=f"missing {missing}",
                cure="add them with `with_prts_tokens`",
            )
        self.fast_size = 0
        while tokenizer.token_to_id(prompt.fast_token(self.fast_size)) is not None:
            self.fast_size += 1
        self.fast_base = self.id(prompt.fast_token(0)) if self.fast_size else -1
        last = self.fast_base + self.fast_size - 1
        if self.fast_size and self.id(prompt.fast_token(self.fast_size - 1)) != last:
            raise CheckpointError(
                "The FAST tokens have no consecutive ids",
                field=prompt.fast_token(self.fast_size - 1),
                found=self.id(prompt.fast_token(self.fast_size - 1)),
                expected=last,
            )

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise DataError("The tokenizer has no such token", field=token)
        return found

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def ascii_ids(self) -> np.ndarray:
        """(len(self),) bool: tokens that stand for printable ASCII and nothing else: what a policy may say aloud.

        Control, PRTS and FAST tokens, line breaks and pieces of multi-byte characters are none of them.
        """
        special = {*prompt.CONTROL_TOKENS, *prompt.PRTS_TOKENS, *map(prompt.fast_token, range(self.fast_size))}
        out = np.zeros(len(self), bool)
        for token, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            text = self.decode([index])
            out[index] = bool(text) and token not in special and all(" " <= c <= "~" for c in text)
        return out

    @property
    def own_ids(self) -> list[int]:
        """Ids of the PRTS and FAST tokens, which no pretrained language model knows."""
        return [*map(self.id, prompt.PRTS_TOKENS), *range(self.fast_base, self.fast_base + self.fast_size)]

    def save(self, path: Path) -> None:
        self.tokenizer.save(str(path))

    @staticmethod
    def load(path: Path) -> TextTokenizer:
        """A tokenizer file, or a checkpoint folder that holds one, with the PRTS tokens in it."""
        return TextTokenizer(read_tokenizer(path))

    @staticmethod
    def train(sentences: list[str], camera_labels: list[str], vocab_size: int, fast_size: int) -> TextTokenizer:
        """A small tokenizer for these sentences. Deterministic: the same sentences give the same file."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator([s for s in sorted(set(sentences)) for _ in range(4)], trainer)
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True) for t in (*prompt.CONTROL_TOKENS, *prompt.PRTS_TOKENS)]
        )
        tokenizer.add_special_tokens([AddedToken(prompt.fast_token(i), special=True) for i in range(fast_size)])
        phrases = [
            "system\n",
            "user\n",
            "assistant\n",
            prompt.SYSTEM,
            prompt.STATE_INTRO,
            prompt.INSTRUCTION_INTRO,
            prompt.PREDICT,
            prompt.PREDICT_SUBTASK,
            *(f"{label}: " for label in sorted(set(camera_labels))),
        ]
        tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
        # lstrip: an integer swallows the blank before it.
        numbers = [str(i) for i in range(-1, prompt.STATE_BINS + 1)]
        tokenizer.add_tokens([AddedToken(n, normalized=False, lstrip=True) for n in numbers])
        return TextTokenizer(tokenizer)

    def number_ids(self) -> list[int] | None:
        """Ids of the integers 0..1000 where each is one token, else None."""
        ids = [self.tokenizer.token_to_id(str(i)) for i in range(prompt.STATE_BINS + 1)]
        return None if any(i is None for i in ids) else ids  # type: ignore[return-value]


def read_tokenizer(where: str | Path) -> Tokenizer:
    """A tokenizer.json, or a folder or hub id with one, or with Qwen's vocab.json and merges.txt (and its added tokens
    in tokenizer_config.json). Raises CheckpointError where there is none or it cannot be read."""
    path = Path(where).expanduser()
    if not path.is_file():
        folder = local_folder(where, _QWEN_FILES)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return _from_vocabulary(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # the tokenizers package raises bare Exception for malformed files
        raise CheckpointError("A tokenizer cannot be read", file=path, found=str(err)) from err


def _from_vocabulary(folder: Path) -> Tokenizer:
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            "A folder holds no tokenizer",
            file=folder,
            found=f"no tokenizer.json and no {' and no '.join(missing)}",
            expected="tokenizer.json, or vocab.json and merges.txt",
            cure="copy them from the Qwen3-VL checkpoint",
        )
    from transformers import Qwen2Tokenizer

    try:
        return Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as err:  # whatever a malformed vocabulary breaks inside
        raise CheckpointError("A tokenizer cannot be read", file=folder, found=f"{type(err).__name__}: {err}") from err


def with_prts_tokens(tokenizer: Tokenizer, fast_size: int) -> TextTokenizer:
    """Qwen's tokenizer plus what PRTS adds, in the released order of ids: action_start, action_pad, action_end,
    goal_repr, obs_repr, then `fast_size` FAST tokens. Tokens that are there keep their ids.

    Raises CheckpointError where it has other FAST tokens already, or is no Qwen tokenizer.
    """
    added = (*prompt.PRTS_TOKENS, *(prompt.fast_token(i) for i in range(fast_size)))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    made = TextTokenizer(tokenizer)
    if made.fast_size != fast_size:
        raise CheckpointError(
            "The tokenizer was made for another FAST vocabulary",
            found=f"{made.fast_size} FAST tokens",
            expected=fast_size,
            cure="load the FAST processor that the checkpoint was trained with",
        )
    return made
