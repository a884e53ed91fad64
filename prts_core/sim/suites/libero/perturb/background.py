"""LIBERO-Plus, background textures: what table, floor and walls look like. Physics is untouched.

Definition: LIBERO-Plus's two kinds (the surface under the objects, `_table_` / `_tb_`; the scene around). Ours: the
textures. LIBERO-Plus samples 950 of its own; here they are drawn from those that LIBERO ships, and a level is the share
of the new one in the mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.errors import UnavailableError
from prts_core.sim.suites.libero.perturb.draws import LEVELS, draw, levelled

KINDS = ("surface", "surroundings")
FLOOR, WALL = "texplane", "tex-wall"
UNLIKE = 40  # of 255, in a mean colour: a texture that nobody could tell from the old one is passed over
TABLES = ("tex-table", "tex-living_room_table", "tex-desk")


def begin(scene: Any, settings: Mapping[str, Any], task: str) -> None:
    """Paint a scene's surfaces by {level, kind, seed}; `restore` undoes it. ConfigError for other settings."""
    from PIL import Image

    kind, level, seed = levelled("background", settings, KINDS)
    rng = draw("background", kind, level, seed, task)
    folder = Path(scene.env.custom_asset_dir) / "textures"
    files = sorted(folder.glob("*.png"))
    if not files:
        raise UnavailableError("LIBERO's textures are missing", file=folder, cure="prts sim install libero")
    model = scene.model
    present = {model.texture(index).name: index for index in range(model.ntex)}
    on_floor = "floor" in type(scene.env).__name__.lower()
    surface = (FLOOR,) if on_floor else TABLES
    wanted = surface if kind == "surface" else tuple(name for name in (WALL, FLOOR) if name not in surface)
    share = level / LEVELS[-1]
    for name in wanted:
        order = rng.permutation(len(files))
        if name not in present:
            continue
        colour = _texture(model, present[name]).reshape(-1, int(model.tex_nchannel[present[name]]))[:, :3].mean(axis=0)
        for at in order:
            with Image.open(files[at]) as opened:
                picture = opened.convert("RGB")
            if np.abs(np.asarray(picture.resize((1, 1), Image.Resampling.BOX))[0, 0] - colour).max() >= UNLIKE:
                break
        _paint(scene, present[name], picture, share)


def restore(scene: Any) -> None:
    """Take off whatever `begin` painted on this scene."""
    for index, original in scene.painted.items():
        _texture(scene.model, index)[:] = original
        _upload(scene, index)
    scene.painted.clear()


def _paint(scene: Any, index: int, picture: Any, share: float) -> None:
    model = scene.model
    height, width = int(model.tex_height[index]), int(model.tex_width[index])
    faces = height // width if height > width and height % width == 0 else 1  # a cube's six, one below the other
    new = np.tile(np.asarray(picture.resize((width, height // faces))), (faces, 1, 1))
    pixels = _texture(model, index)
    if index not in scene.painted:
        scene.painted[index] = pixels.copy()
    old = scene.painted[index].reshape(height, width, -1)[..., :3]
    mixed = np.rint((1 - share) * old + share * new).astype(np.uint8)
    pixels.reshape(height, width, -1)[..., :3] = mixed
    _upload(scene, index)


def _texture(model: Any, index: int) -> np.ndarray:
    start = int(model.tex_adr[index])
    size = int(model.tex_height[index]) * int(model.tex_width[index]) * int(model.tex_nchannel[index])
    return model.tex_data[start : start + size]


def _upload(scene: Any, index: int) -> None:
    for renderer in scene._renderers.values():
        renderer.upload_texture(index)
