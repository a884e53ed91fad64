"""Augment images by the seven ways of the public PRTS release, drawn per camera from one numpy Generator.

Of each image three of the seven are applied, in random order (`AUGMENTATIONS`): brightness and contrast 0.8-1.2,
saturation 0.5-1.5, hue +-0.05 of the colour circle, sharpness 0.5-1.5, a crop of 0.95-1.0 of the area at the image's
own proportions without resizing back, rotation by +-3 degrees. The release does not say how a rotation fills its
corners: here with black, resampled bilinearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from prts_core.data.images import check_images, resize
from prts_core.io.errors import ConfigError

PER_IMAGE = 3


def _factor(enhance: Callable[[Image.Image], ImageEnhance._Enhance], low: float, high: float):
    def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return enhance(image).enhance(rng.uniform(low, high))

    return apply


def _hue(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn the colour circle by up to a twentieth."""
    turn = round(rng.uniform(-0.05, 0.05) * 256)  # Pillow stores the circle in 256 steps
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(step + turn) % 256 for step in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Keep 0.95 to 1.0 of the area, the same share of each side; the image comes back smaller."""
    side = math.sqrt(rng.uniform(0.95, 1.0))
    width, height = max(1, round(image.width * side)), max(1, round(image.height * side))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _rotate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.rotate(rng.uniform(-3.0, 3.0), resample=Image.Resampling.BILINEAR)


AUGMENTATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "brightness": _factor(ImageEnhance.Brightness, 0.8, 1.2),
    "contrast": _factor(ImageEnhance.Contrast, 0.8, 1.2),
    "saturation": _factor(ImageEnhance.Color, 0.5, 1.5),
    "hue": _hue,
    "sharpness": _factor(ImageEnhance.Sharpness, 0.5, 1.5),
    "crop": _crop,
    "rotation": _rotate,
}
_NAMES = tuple(AUGMENTATIONS)


def augment(image: np.ndarray, rng: np.random.Generator, names: Sequence[str] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 -> (H', W', 3) uint8: three of the seven in random order; the crop may make it smaller.

    names: apply exactly these, in this order, instead of a random three. The same image and the same state of `rng`
    give the same bytes. Raises DataError for another form, ConfigError for an unknown name.
    """
    check_images(image[None])
    if names is None:
        chosen = [_NAMES[index] for index in rng.permutation(len(_NAMES))[:PER_IMAGE]]
    else:
        chosen = list(names)
    unknown = [name for name in chosen if name not in AUGMENTATIONS]
    if unknown:
        raise ConfigError("Unknown image augmentation", found=unknown[0], expected=", ".join(_NAMES))
    picture = Image.fromarray(image)
    for name in chosen:
        picture = AUGMENTATIONS[name](picture, rng)
    return np.asarray(picture)


def augment_view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`augment` of an image that has the model's size already: a cropped one is resized back."""
    height, width = image.shape[:2]
    return resize(augment(image, rng)[None], height, width)[0]


def preview(images: Sequence[np.ndarray], rng: np.random.Generator, draws: int = 4) -> np.ndarray:
    """A contact sheet (H, W, 3) uint8: a row an image: itself, each of the seven alone, then `draws` random triples."""
    gap = 4
    cell_h, cell_w = (max(image.shape[axis] for image in images) + gap for axis in (0, 1))
    sheet = np.full((cell_h * len(images), cell_w * (1 + len(_NAMES) + draws), 3), 255, np.uint8)
    for row, image in enumerate(images):
        cells = [image, *(augment(image, rng, [name]) for name in _NAMES), *(augment(image, rng) for _ in range(draws))]
        for column, cell in enumerate(cells):
            top, left = row * cell_h, column * cell_w
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet
