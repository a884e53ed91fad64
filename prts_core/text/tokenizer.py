"""Text tokenizer: Qwen's own loaded from a folder or hub id, or a small one trained on the sentences at hand.

It does not know images or actions beyond their placeholder tokens. The small one keeps what matters of Qwen's:
byte-level
BPE, the same control tokens. The prompt's fixed phrases and the integers 0 to 1000 are single tokens, so that a sample
stays short on a CPU.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from prts_core.errors import CheckpointError, DataError
from prts_core.text import prompt


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

    def save(self, path: Path) -> None:
        self.tokenizer.save(str(path))

    @staticmethod
    def load(path: Path) -> TextTokenizer:
        try:
            return TextTokenizer(Tokenizer.from_file(str(path)))
        except Exception as err:
            raise CheckpointError("A tokenizer cannot be read", file=path, found=str(err)) from err

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
        phrases = ["system\n", "user\n", "assistant\n", prompt.SYSTEM, prompt.STATE_INTRO, prompt.INSTRUCTION_INTRO,
                   prompt.PREDICT, *(f"{label}: " for label in sorted(set(camera_labels)))]  # fmt: skip
        tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
        # lstrip: an integer swallows the blank before it.
        numbers = [str(i) for i in range(-1, prompt.STATE_BINS + 1)]
        tokenizer.add_tokens([AddedToken(n, normalized=False, lstrip=True) for n in numbers])
        return TextTokenizer(tokenizer)

    def number_ids(self) -> list[int] | None:
        """Ids of the integers 0..1000 where each is one token, else None."""
        ids = [self.tokenizer.token_to_id(str(i)) for i in range(prompt.STATE_BINS + 1)]
        return None if any(i is None for i in ids) else ids  # type: ignore[return-value]
