"""SimplerEnv's WidowX tasks as data, under the protocol that policies of the Bridge data are evaluated with.

It imports no simulator. Which tasks there are depends on the assets of this machine and is read from the installed
simulator's record; what the numbers of state and action mean is that of configs/robots/widowx_bridge.yaml, which a test
compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prts_core.contract import Camera, Contract, Dimension
from prts_core.sim.suite import SuiteSpec, Task

FAMILY = "simpler"
SUITE = "simpler_widowx"
CAMERA = "observation.images.image_0"  # as the Bridge data set names its view over the shoulder
CONTROL_HZ = 5.0
HEIGHT, WIDTH = 480, 640
EPISODES_PER_TASK = 24
SEED = 0
GRIPPER_SWITCH = 0.5  # above it the gripper opens


@dataclass(frozen=True)
class SimplerTask:
    """What ManiSkill calls it, and the files below the assets' task folder that it cannot do without.

    models: folders of custom/models: the thing that is carried, then where it goes, then what else stands there.
    """

    environment: str
    instruction: str
    max_steps: int
    models: tuple[str, ...]
    index: str = "info_bridge_custom_v0.json"
    stage: str = "bridge_table_1_v1.glb"
    photograph: str = "bridge_real_eval_1.png"


TASKS = {
    "widowx_spoon_on_towel": SimplerTask(
        "PutSpoonOnTableClothInScene",
        "put the spoon on the towel",
        60,
        ("bridge_spoon_generated_modified", "table_cloth_generated_shorter"),
    ),
    "widowx_carrot_on_plate": SimplerTask(
        "PutCarrotOnPlateInScene",
        "put carrot on plate",
        60,
        ("bridge_carrot_generated_modified", "bridge_plate_objaverse_larger"),
    ),
    "widowx_stack_cube": SimplerTask(
        "StackGreenCubeOnYellowCubeBakedTexInScene",
        "stack the green block on the yellow block",
        60,
        ("baked_green_cube_3cm", "baked_yellow_cube_3cm"),
        index="info_bridge_custom_baked_tex_v0.json",
    ),
    "widowx_put_eggplant_in_basket": SimplerTask(
        "PutEggplantInBasketScene",
        "put eggplant into yellow basket",
        120,
        ("eggplant", "dummy_sink_target_plane", "sink"),
        stage="bridge_table_1_v2.glb",
        photograph="bridge_sink.png",
    ),
}
SOURCE = (
    "SimplerEnv (Li et al. 2024, arXiv:2405.05941), visual matching on WidowX and Bridge, as ManiSkill 3.0.1 has it "
    "(the published numbers come from SAPIEN 2 and another PhysX): episode ids 0 to 23 in order, 60 steps (eggplant "
    "120) at 5 Hz over 500 Hz of physics, no step before the first look but ManiSkill's own settling; an episode runs "
    "to its last step and is judged by the last, so that success is reported nowhere else; one camera, its background "
    "replaced by the photograph of the real table; the gripper opens above 0.5 and closes below, as SimplerEnv's "
    "policies switch it; action rotations are roll, pitch, yaw about the base's axes, which SimplerEnv's policies turn "
    "into an axis times angle and we into the angles that ManiSkill 3's controller reads; pictures at another size are "
    "squeezed to a square, as the Bridge data set in RLDS holds them (256 px)"
)


def contract() -> Contract:
    """State: the hand's position from the base and its turn from pointing straight down, as roll, pitch, yaw, and how
    far the gripper is open (1: fully). Action: displacements of the hand's goal in a step, and the gripper."""
    return Contract(
        embodiment="widowx_bridge",
        control_hz=CONTROL_HZ,
        state=(
            *(Dimension(axis, "m") for axis in ("x", "y", "z")),
            *(Dimension(angle, "rad") for angle in ("roll", "pitch", "yaw")),
            Dimension("gripper", "1"),
        ),
        action=(
            *(Dimension(axis, "m") for axis in ("dx", "dy", "dz")),
            *(Dimension(angle, "rad") for angle in ("droll", "dpitch", "dyaw")),
            Dimension("gripper", "1"),
        ),
        cameras=(Camera(CAMERA, "Camera", HEIGHT, WIDTH),),
        rotation="rpy",
        gripper="+1 opens, 0 closes",
    )


def suites() -> dict[str, SuiteSpec]:
    """Every suite by name. UnavailableError where the simulator is not installed."""
    from prts_core.sim.installations import Installation

    return suites_of(Installation(FAMILY).require())


def suites_of(record: Mapping[str, Any]) -> dict[str, SuiteSpec]:
    """The suites of an installed.json: its `unavailable` tasks are left out, its `standins` label says so."""
    left_out = record.get("unavailable", {})
    tasks = tuple(
        Task(name, task.instruction, EPISODES_PER_TASK, task.max_steps)
        for name, task in TASKS.items()
        if name not in left_out
    )
    found = SuiteSpec(
        name=SUITE,
        family=FAMILY,
        tasks=tasks,
        contract=contract(),
        settle_steps=0,
        settle_action=(0.0,) * 6 + (1.0,),
        image_rotation=0,
        episodes_per_task=EPISODES_PER_TASK,
        seed=SEED,
        source=SOURCE,
        standins=str(record.get("standins", "")),
    )
    return {SUITE: found}
