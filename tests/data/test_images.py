"""Image sizing: Qwen's token budget held against transformers' own rule, bicubic resizing, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from prts_core.data.images import letterbox, resize, resize_for_model, smart_size
from prts_core.io.errors import DataError


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (256, 256, (256, 256)),
        (480, 640, (320, 416)),
        (64, 64, (256, 256)),
        (720, 1280, (288, 512)),
        (224, 224, (256, 256)),
        (384, 384, (384, 384)),
        (1080, 1920, (288, 512)),
    ],
)
def test_views_take_64_to_144_tokens(height: int, width: int, expected: tuple[int, int]) -> None:
    assert smart_size(height, width) == expected
    assert 64 <= expected[0] * expected[1] // 32**2 <= 144


def test_the_rule_is_that_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 1500, (400, 2)).tolist():
        for factor, low, high in ((32, 64 * 1024, 144 * 1024), (16, 4 * 256, 60 * 256), (28, 3136, 1003520)):
            expected = theirs(height, width, factor=factor, min_pixels=low, max_pixels=high)
            assert smart_size(height, width, factor, low, high) == tuple(expected), (height, width, factor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 5), "200 : 1"),
        ((2, 500), "200 : 1"),
        ((64, 64, 32, 200_000, 100_000), "budget is empty"),
        ((64, 64, 32, 1, 100), "budget is empty"),
    ],
)
def test_impossible_sizes_are_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(DataError, match=words):
        smart_size(*arguments)


def test_resize_is_bicubic_and_antialiased() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 96, 128, 3), dtype=np.uint8)
    small = resize(images, 32, 64)
    assert small.shape == (2, 32, 64, 3) and small.dtype == np.uint8
    assert small.std() < 0.6 * images.std()  # noise is averaged away, not picked
    assert resize(images, 96, 128) is images
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (1, 16, 64, 3)).copy()
    assert np.abs(np.diff(resize(ramp, 16, 32)[0, 8, :, 0].astype(int)) - 8).max() <= 3
    assert resize(images[:0], 8, 8).shape == (0, 8, 8, 3)
    with pytest.raises(DataError, match="float32"):
        resize(images.astype(np.float32), 8, 8)


def test_fit_takes_a_square_or_a_rectangle() -> None:
    images = np.full((1, 10, 20, 3), 7, np.uint8)
    assert (resize_for_model(images, 16) == letterbox(images, 16)).all()
    assert resize_for_model(images, (8, 24)).shape == (1, 8, 24, 3)
