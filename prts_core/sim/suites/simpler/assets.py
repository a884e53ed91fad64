"""Which of SimplerEnv's assets a folder holds, so that ManiSkill never has to ask for one (it asks on stdin).

The folder is what ManiSkill takes as MS_ASSET_DIR.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.sim.suites.simpler.spec import TASKS

ROBOT = Path("data/robots/widowx")
BRIDGE = Path("data/tasks/bridge_v2_real2sim_dataset")
NEEDED = (ROBOT / "wx250s.urdf", ROBOT / "meshes_wx250s", BRIDGE / "custom", BRIDGE / "real_inpainting")
_LOOKS = ("textured.obj", "textured.dae", "textured.glb")


def missing(assets: Path, task: str) -> Path | None:
    """The first file, below `assets`, that a task lacks; None where it has everything.

    The photograph counts: without it a policy would be shown a scene that the protocol does not show."""
    wanted = TASKS[task]
    files = [
        *NEEDED,
        BRIDGE / "custom" / wanted.index,
        BRIDGE / "stages" / wanted.stage,
        BRIDGE / "real_inpainting" / wanted.photograph,
    ]
    for model in wanted.models:
        folder = BRIDGE / "custom" / "models" / model
        files.append(folder / "collision.obj")
        files.append(next((folder / name for name in _LOOKS if (assets / folder / name).is_file()), folder / _LOOKS[1]))
    return next((file for file in files if not (assets / file).exists()), None)


def unavailable(assets: Path) -> dict[str, str]:
    """{task: the file it lacks} of the tasks that these assets do not carry."""
    found = {task: missing(assets, task) for task in TASKS}
    return {task: str(file) for task, file in found.items() if file is not None}
