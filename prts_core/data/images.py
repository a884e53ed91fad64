"""Bring camera images to the model's size, for training and serving alike: a square box, or Qwen's token budget.

Pillow is imported only where an image is opened or resized. `letterbox` (area averages, black
bars) serves the small square models; `smart_size` and `resize` are what a released checkpoint was trained with.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import DataError


@contextmanager
def opened_picture(source: bytes | Path, problem: str, formats: tuple[str, ...] | None = None, **more: Any) -> Iterator:
    """A still as Pillow's image, pixels not yet read. What Pillow cannot open or decode becomes a DataError `problem`
    with the parts in `more`; formats: the only ones that are tried."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            yield image
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise DataError(problem, found=str(err)[:160], **more) from err


def letterbox(images: np.ndarray, size: int) -> np.ndarray:
    """Scale (N, H, W, 3) uint8 images into (N, size, size, 3) uint8: longer side fits, the rest is black.

    Images that have the size already come back as they are. Shrinking averages over areas (no aliasing), growing
    interpolates linearly. Raises DataError for another dtype or shape.
    """
    check_images(images)
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


def check_images(images: np.ndarray) -> None:
    """Refuse what is not uint8 (N, H, W, 3) with something in it."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise DataError(
            "Camera images have the wrong form",
            found=f"{images.dtype} {images.shape}",
            expected="uint8 (N, height, width, 3)",
            cure="pass RGB images of 0-255, one batch axis first",
        )


def smart_size(
    height: int, width: int, factor: int = 32, min_pixels: int = 64 * 32 * 32, max_pixels: int = 144 * 32 * 32
) -> tuple[int, int]:
    """(height, width) in pixels that Qwen-VL gives an image: multiples of `factor` within a pixel budget.

    Each side is rounded to the nearest multiple; where the area then leaves [min_pixels, max_pixels], both sides are
    scaled by one number and rounded inward, so that the aspect stays. With the defaults a view takes 64 to 144 visual
    tokens of 32 x 32 pixels: 256 x 256 keeps its size and takes 64. Raises DataError for sides beyond 200 : 1.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise DataError(
            "An image cannot be brought to a visual-token budget",
            found=f"{height} x {width} pixels",
            expected="sides of at least 1 pixel, at most 200 : 1",
        )
    if min_pixels > max_pixels or max_pixels < factor**2:
        raise DataError(
            "A visual-token budget is empty",
            found=f"{min_pixels} to {max_pixels} pixels",
            expected=f"at least one token of {factor} x {factor}",
        )
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, height, width, 3) uint8, bicubic with antialiasing; proportions are not kept.

    Images that have the size already come back as they are. Raises DataError for another dtype or shape.
    """
    check_images(images)
    if images.shape[1:3] == (height, width):
        return images
    from PIL import Image

    scaled = (Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in images)
    return (
        np.stack([np.asarray(image) for image in scaled]) if len(images) else np.zeros((0, height, width, 3), np.uint8)
    )


def resize_for_model(images: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Images at the model's size: letterboxed into a square (int), or resized to (height, width)."""
    return letterbox(images, size) if isinstance(size, int) else resize(images, *size)


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of a triangle filter as wide as one output pixel's neighbourhood; rows sum to 1."""
    ratio = max(old / new, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    weights = np.clip(1.0 - np.abs(np.arange(old)[None] - centres) / ratio, 0.0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
