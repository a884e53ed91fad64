"""Name a skill: its id, version, licence, what it is for.

The vocabularies are closed, as the public schema has them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

SkillId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$")]
"""owner/repository, as on the hub."""

Version = Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?$")]
"""Of the package, not of its weights: three numbers, then a pre-release and a build where there are any."""

Description = Annotated[str, Field(min_length=1, max_length=500)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$")]

Role = Literal["s0", "s1", "s2"]
"""s0: reflexes; s1: a policy at control rate; s2: what reasons."""

ModelFamily = Literal[
    "smolvla", "pi05", "xvla", "act", "diffusion", "rldx", "molmoact2", "gr00t", "diffuser_actor", "openvla"
]
EmbodimentTag = Literal[
    "aloha",
    "aloha_agilex",
    "any",
    "custom",
    "franka_panda",
    "g1",
    "google_robot",
    "gr1",
    "h1",
    "mobile_base",
    "openarm",
    "panda_mobile",
    "pusht",
    "rizon4",
    "sawyer",
    "so100_follower",
    "so101_follower",
    "ur10e",
    "ur5e",
    "widowx",
]
ANY, CUSTOM = "any", "custom"  # tags that are no robots

Verb = Literal[
    "pick",
    "place",
    "pick_and_place",
    "transfer",
    "grasp",
    "release",
    "open",
    "close",
    "push",
    "pull",
    "slide",
    "insert",
    "pour",
    "wipe",
    "rotate",
    "reach",
    "look",
    "navigate",
    "wave",
    "shake",
    "generalist",
    "detect",
    "query",
    "monitor",
    "plan",
]
SuiteId = Literal[
    "aloha",
    "aloha_insertion",
    "aloha_transfer_cube",
    "gr1_tabletop",
    "libero_10",
    "libero_goal",
    "libero_object",
    "libero_spatial",
    "maniskill3_panda",
    "metaworld_mt10",
    "metaworld_mt50",
    "pusht",
    "rlbench",
    "robocasa_pnp",
    "robotwin",
    "simpler_env_widowx",
]
TEMPLATE_WORDS = ("TEMPLATE_ORG", "TEMPLATE_ID")
"""Where one of these is left in name, weights_uri or source_repo, the package is a template: it parses, and is offered
to nobody."""
