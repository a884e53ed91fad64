"""Pictures of a MuJoCo scene from its fixed cameras, without a screen, for any simulator that holds a model and data.

MUJOCO_GL (egl, osmesa) says how; it must be set before mujoco is first imported.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

MAX_GEOMS = 1000


class Renderer:
    """One scene's meshes and textures on the GL side; looking costs no physics and changes none.

    hidden_groups: groups of geoms that are not drawn. plain: without shadows and reflections. Multisampling is off:
    `model.vis.quality.offsamples` is set to 0 before the context is made, which is the larger part of the time with a
    software rasteriser.
    """

    def __init__(self, model: Any, size: int, hidden_groups: tuple[int, ...] = (), *, plain: bool = False) -> None:
        import mujoco

        self.mujoco, self.model, self.size = mujoco, model, size
        model.vis.quality.offsamples = 0
        if plain:
            model.vis.quality.shadowsize = 0  # the map of shadows takes 64 MB, whether any is drawn or not
        model.vis.global_.offwidth = size
        model.vis.global_.offheight = size
        self.gl = _gl_context(size)
        self.gl.make_current()
        self.scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        if plain:
            self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.option, self.perturb, self.camera = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        for group in hidden_groups:
            self.option.geomgroup[group] = 0
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self.viewport = mujoco.MjrRect(0, 0, size, size)

    def __call__(self, data: Any, camera_id: int) -> np.ndarray:
        """(size, size, 3) uint8 picture as OpenGL returns it: the bottom row first."""
        mj = self.mujoco
        self.gl.make_current()
        # Another renderer may have bound its own buffer; without this the first picture after it is that one's last.
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.camera.fixedcamid = camera_id
        mj.mjv_updateScene(self.model, data, self.option, self.perturb, self.camera, mj.mjtCatBit.mjCAT_ALL, self.scene)
        mj.mjr_render(self.viewport, self.scene, self.context)
        out = np.empty((self.size, self.size, 3), np.uint8)
        mj.mjr_readPixels(out, None, self.viewport, self.context)
        return out

    def upload_texture(self, index: int) -> None:
        """Show what the model's texture has become."""
        self.gl.make_current()
        self.mujoco.mjr_uploadTexture(self.model, self.context, index)

    def close(self) -> None:
        """Give back what lies on the GL side; the renderer is then of no use."""
        self.gl.make_current()
        self.context.free()


@lru_cache(maxsize=4)
def _gl_context(size: int) -> Any:
    """One GL context a process and size, kept as long as the process: freeing EGL contexts at exit prints noise."""
    import mujoco

    return mujoco.GLContext(size, size)
