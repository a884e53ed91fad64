"""The words around a sample: instruction clean-up, proprioception as integers, the chat scaffold of PRTS.

Every fixed phrase stands here once, so that a tokenizer of ours can learn them whole. compat "prts": the very words
that the public release's checkpoints were trained on, slips included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from prts_core.config.model import Compat
from prts_core.io.errors import DataError

if TYPE_CHECKING:
    import torch

SYSTEM = "You are a helpful physical assistant."
PREDICT = "\nPredict the next action chunk in low-level robotics action format."
PREDICT_SUBTASK = "\nPredict the next subtask, then the next action chunk in low-level robotics action format."
STATE_INTRO = "Proprioception (normalized to 0-1000 scale):"
INSTRUCTION_INTRO = "Instruction: "
DEFAULT_INSTRUCTION = "Analyze the visual observations and proprioception to execute the intended manipulation task."
STATE_BINS = 1000

# Qwen's own control tokens, then those PRTS adds.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
ACTION_START, ACTION_PAD, ACTION_END = "<|action_start|>", "<|action_pad|>", "<|action_end|>"
GOAL, OBS = "<|goal_repr|>", "<|obs_repr|>"
IMAGE_TAG = "<image>"  # in image-text data
CONTROL_TOKENS = ("<|endoftext|>", IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
PRTS_TOKENS = (ACTION_START, ACTION_PAD, ACTION_END, GOAL, OBS)  # in the released order of their ids
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


def fast_token(index: int) -> str:
    return f"<|action_token_{index}|>"


def clean_instruction(text: str | None, fallback: str | None = None, *, compat: Compat = "none") -> str:
    """'open the faucet' -> 'Open the faucet.'; of empty text `fallback` (the episode's task), then a default sentence.

    compat "prts": a full stop follows whatever the text ends with ("Close the door!."), and "." counts as text.
    """
    for candidate in (text, fallback):
        if compat == "prts":
            if candidate:
                return candidate.lower().strip().rstrip(".").capitalize() + "."
        elif words := (candidate or "").lower().strip().rstrip(". \t\r\n"):
            sentence = " ".join(words.split()).capitalize()
            return sentence if sentence[-1] in _SENTENCE_ENDS else sentence + "."
    return DEFAULT_INSTRUCTION


def with_advantage(text: str, good: bool) -> str:
    """The instruction with a word on how well it was, or is to be, followed (RECAP, arXiv:2511.14759)."""
    return f"{text.rstrip('. ')}. advantage {'positive' if good else 'negative'}"


def task_id(instruction: str, compat: Compat = "none") -> int:
    """Signed 64-bit id: the first 8 bytes, little endian, of the MD5 of the instruction in lower case, stripped.

    Samples of one id are no negatives of each other, so instructions that read alike in the prompt must share it: the
    cleaned sentence is hashed. compat "prts": the raw one, where "open it" and "open it." are two tasks.
    """
    text = instruction if compat == "prts" else clean_instruction(instruction)
    digest = hashlib.md5(text.lower().strip().encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def state_bins(normalized: np.ndarray | torch.Tensor, compat: Compat = "none") -> np.ndarray:
    """State normalised to [-1, 1] -> int64: floor((s + 1) / 2 * 1000), -1 below the range, 1000 from its top on.

    Raises DataError for what is not finite. compat "prts": truncated towards zero (-1.002 falls into bin 0), computed
    in the dtype given (bfloat16 is coarser than the bins), and what leaves int32 becomes -1.
    """
    import torch  # words alone do without

    values = torch.as_tensor(normalized)
    if not bool(torch.isfinite(values).all()):
        raise DataError("A state is not finite", field="observation.state", found=values.tolist())
    if compat == "prts":
        scaled = ((values + 1) / 2 * STATE_BINS).double().trunc()
        scaled = torch.where(scaled.abs() < 2**31, scaled, -1)
    else:
        scaled = ((values.float() + 1) / 2 * STATE_BINS).floor()
    return scaled.clamp(-1, STATE_BINS).to(torch.int64).numpy()


def has_markers(contrastive: bool, compat: Compat = "none") -> bool:
    """Whether <|obs_repr|> and <|goal_repr|> stand in the prompt. The public release leaves them out where no
    contrastive part follows, in pre-training and in post-training alike."""
    return contrastive or compat == "none"


def system_text() -> str:
    return f"{IM_START}system\n{SYSTEM}{IM_END}\n"


def image_text(tokens: int) -> str:
    """An image's placeholders, `tokens` of them."""
    return f"{VISION_START}{IMAGE_PAD * tokens}{VISION_END}"


def conversation_texts(turns: Sequence[tuple[str, str]], image_tokens: Sequence[int]) -> list[tuple[str, str, str]]:
    """Turns (role, text) of an image-text conversation -> (opening, text, closing) of each, images expanded.

    Role "user" or "assistant". Every `<image>` stands for the next image; DataError where their numbers differ.
    """
    wanted = sum(text.count(IMAGE_TAG) for _, text in turns)
    if wanted != len(image_tokens):
        raise DataError(
            "A conversation and its images do not fit",
            field=IMAGE_TAG,
            found=f"{len(image_tokens)} images",
            expected=f"{wanted}, one a tag",
            cure="correct the entry in the image-text file",
        )
    out, image = [], iter(image_tokens)
    for role, text in turns:
        parts = text.split(IMAGE_TAG)
        filled = parts[0] + "".join(image_text(next(image)) + part for part in parts[1:])
        out.append((f"{IM_START}{role}\n", filled, f"{IM_END}\n"))
    return out


def head_text(camera_labels: tuple[str, ...], image_tokens: tuple[int, ...]) -> str:
    """System message and the camera lines of the user message, image placeholders expanded."""
    cameras = "".join(
        f"{label}: {image_text(count)}\n" for label, count in zip(camera_labels, image_tokens, strict=True)
    )
    return f"{system_text()}{IM_START}user\n{cameras}"


def state_text(bins: np.ndarray | None, markers: bool = True) -> str:
    """The proprioception's line (none for a robot without) and the marker that ends the observation."""
    line = "" if bins is None else f"{STATE_INTRO} {' '.join(str(int(b)) for b in bins)}\n"
    return line + (OBS if markers else "")


def instruction_text(instruction: str | None, markers: bool = True, compat: Compat = "none") -> str:
    """What psi(l) reads: the cleaned sentence and its goal token."""
    return f"{INSTRUCTION_INTRO}{clean_instruction(instruction, compat=compat)}{GOAL if markers else ''}"


def tail_text(subtask: bool = False) -> str:
    """What closes the user's turn and opens the assistant's. subtask: the answer begins with the next subtask."""
    return f"{PREDICT_SUBTASK if subtask else PREDICT}{IM_END}\n{IM_START}assistant\n"
