"""The words around a sample: instruction clean-up, proprioception as integers, the chat scaffold of PRTS.

It does not know token ids or tensors. Every fixed phrase stands here once, so that a tokenizer of ours can learn
them whole.
"""

from __future__ import annotations

import numpy as np

from prts_core.errors import DataError

SYSTEM = "You are a helpful physical assistant."
PREDICT = "\nPredict the next action chunk in low-level robotics action format."
STATE_INTRO = "Proprioception (normalized to 0-1000 scale):"
INSTRUCTION_INTRO = "Instruction: "
DEFAULT_INSTRUCTION = "Complete the task."
STATE_BINS = 1000

# Qwen's own control tokens, then those PRTS adds.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
ACTION_START, ACTION_PAD, ACTION_END = "<|action_start|>", "<|action_pad|>", "<|action_end|>"
GOAL, OBS = "<|goal_repr|>", "<|obs_repr|>"
CONTROL_TOKENS = ("<|endoftext|>", IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>")
PRTS_TOKENS = (ACTION_START, ACTION_PAD, ACTION_END, GOAL, OBS)


def fast_token(index: int) -> str:
    return f"<|action_token_{index}|>"


def clean_instruction(text: str | None) -> str:
    """'open the faucet' -> 'Open the faucet.'; empty text becomes a default sentence."""
    words = (text or "").lower().strip().rstrip(".").strip()
    return (words.capitalize() + ".") if words else DEFAULT_INSTRUCTION


def state_bins(normalized: np.ndarray) -> np.ndarray:
    """State normalised to [-1, 1] -> integers: trunc((s + 1) / 2 * 1000), clamped to [-1, 1000]. Non-finite is
    refused."""
    if not np.isfinite(normalized).all():
        raise DataError("A state is not finite", field="observation.state", found=normalized.tolist())
    scaled = (normalized.astype(np.float32) + 1.0) / 2.0 * STATE_BINS
    return np.clip(np.trunc(scaled), -1, STATE_BINS).astype(np.int64)


def head_text(camera_labels: tuple[str, ...], image_tokens: tuple[int, ...]) -> str:
    """System message and the camera lines of the user message, image placeholders expanded."""
    cameras = "".join(
        f"{label}: {VISION_START}{IMAGE_PAD * count}{VISION_END}\n"
        for label, count in zip(camera_labels, image_tokens, strict=True)
    )
    return f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n{cameras}"


def state_text(bins: np.ndarray) -> str:
    return f"{STATE_INTRO} {' '.join(str(int(b)) for b in bins)}\n{OBS}"


def instruction_text(instruction: str) -> str:
    """What psi(l) reads: the cleaned sentence and its goal token."""
    return f"{INSTRUCTION_INTRO}{clean_instruction(instruction)}{GOAL}"


def tail_text() -> str:
    return f"{PREDICT}{IM_END}\n{IM_START}assistant\n"


def response_text(action_tokens: str) -> str:
    """The assistant's turn in pre-training; fine-tuning leaves it out."""
    return f"{action_tokens}{IM_END}\n"
