"""The seven augmentations: ranges, randomness from one generator only, each camera on its own."""

from __future__ import annotations

import numpy as np
import pytest

from prts_core.data.augment import AUGMENTATIONS, augment, augment_view, preview
from prts_core.io.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """96 x 128 with colour ramps and an edge, so that every augmentation has something to change."""
    rows, columns = np.mgrid[0:96, 0:128]
    image = np.stack([60 + columns, 40 + rows, np.where(columns > 64, 180, 60)], axis=-1).astype(np.uint8)
    image[20:40, 30:60] = (210, 40, 30)
    return image


def test_same_generator_same_bytes_other_generator_others(scene: np.ndarray) -> None:
    def draw(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [augment(scene, rng) for _ in range(4)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all((a.shape == b.shape) and (a == b).all() for a, b in zip(first, again, strict=True))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, other, strict=True))
    before = scene.copy()
    draw(3)
    assert (scene == before).all()


def test_three_different_ones_in_random_order(scene: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name, apply in AUGMENTATIONS.items():
        monkeypatch.setitem(AUGMENTATIONS, name, lambda image, rng, n=name, f=apply: (used.append(n), f(image, rng))[1])
    rng, orders, counts = np.random.default_rng(0), set(), dict.fromkeys(AUGMENTATIONS, 0)
    for _ in range(300):
        used.clear()
        augment(scene[:8, :8], rng)
        assert len(used) == len(set(used)) == 3
        orders.add(tuple(used))
        for name in used:
            counts[name] += 1
    assert len(orders) > 100  # of 210 ordered triples
    assert all(90 < count < 170 for count in counts.values())  # 300 * 3 / 7 = 129 each


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_changes_the_image_within_its_range(scene: np.ndarray, name: str) -> None:
    rng = np.random.default_rng(4)
    draws = [augment(scene, rng, [name]) for _ in range(40)]
    assert any(d.shape != scene.shape or (d != scene).any() for d in draws)
    means = np.array([d.astype(float).mean() for d in draws]) / scene.mean()
    if name == "brightness":
        assert 0.79 < means.min() < 0.87 and 1.13 < means.max() < 1.21
    elif name == "contrast":
        spread = np.array([d.astype(float).std() for d in draws]) / scene.astype(float).std()
        assert 0.78 < spread.min() < 1 < spread.max() < 1.22
    elif name == "crop":
        share = np.array([d.shape[0] * d.shape[1] for d in draws]) / scene[..., 0].size
        assert 0.94 < share.min() < 0.97 and share.max() <= 1.0
        assert all(abs(d.shape[1] / d.shape[0] - 128 / 96) < 0.02 for d in draws)
    elif name == "hue":  # value, the largest channel, stays within the rounding of a turn around the circle
        assert max(np.abs(d.max(-1).astype(int) - scene.max(-1)).max() for d in draws) <= 2
    elif name == "saturation":
        grey = scene @ [0.299, 0.587, 0.114]
        assert max(np.abs(d @ [0.299, 0.587, 0.114] - grey).max() for d in draws) < 40
    elif name == "rotation":
        centre = scene[44:52, 60:68].astype(int)
        assert all(np.abs(d[44:52, 60:68] - centre).mean() < 12 for d in draws)
        assert any((d[0, 0] == 0).all() or (d[-1, 0] == 0).all() for d in draws)


def test_views_keep_their_shape_and_differ(scene: np.ndarray) -> None:
    rng = np.random.default_rng(7)
    views = [augment_view(scene, rng) for _ in range(6)]
    assert all(view.shape == scene.shape and view.dtype == np.uint8 for view in views)
    assert any((view != scene).any() for view in views) and (views[0] != views[1]).any()


def test_bad_input_is_named(scene: np.ndarray) -> None:
    with pytest.raises(DataError, match="float64"):
        augment(scene / 255.0, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="blur"):
        augment(scene, np.random.default_rng(0), ["blur"])


def test_the_contact_sheet_shows_every_augmentation(scene: np.ndarray) -> None:
    sheet = preview([scene, scene[:64]], np.random.default_rng(0), draws=2)
    assert sheet.shape == (2 * 100, 10 * 132, 3)
    assert (sheet[:96, :128] == scene).all()
