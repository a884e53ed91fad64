"""One way to bring camera images to the model's square size, for training and serving alike.

It knows numpy only: no video, no dataset. Area-averaging with black bars keeps the scene's proportions.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from prts_core.errors import DataError


def letterbox(images: np.ndarray, size: int) -> np.ndarray:
    """Scale (N, H, W, 3) uint8 images into (N, size, size, 3) uint8: longer side fits, the rest is black.

    Images that have the size already come back as they are. Shrinking averages over areas (no aliasing), growing
    interpolates linearly. Raises DataError for another dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(
            "Camera images have the wrong form",
            found=f"{images.dtype} {images.shape}",
            expected="uint8 (N, height, width, 3)",
            cure="pass RGB images of 0-255, one batch axis first",
        )
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    scale = size / max(height, width)
    new_h, new_w = max(1, round(height * scale)), max(1, round(width * scale))
    rows, columns = _weights(height, new_h), _weights(width, new_w)
    out = np.zeros((len(images), size, size, 3), np.uint8)
    top, left = (size - new_h) // 2, (size - new_w) // 2
    for index, image in enumerate(images):  # one at a time: a batch of 640x480 floats would take gigabytes
        tall = rows @ image.reshape(height, width * 3).astype(np.float32)  # (new_h, W*3)
        small = columns @ tall.reshape(new_h, width, 3)  # (new_h, new_w, 3)
        out[index, top : top + new_h, left : left + new_w] = np.clip(np.rint(small), 0, 255)
    return out


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of a triangle filter as wide as one output pixel's neighbourhood; rows sum to 1."""
    ratio = max(old / new, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    weights = np.clip(1.0 - np.abs(np.arange(old)[None] - centres) / ratio, 0.0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
