"""Resource instances per environment, chosen by $PRTS_ENV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.dvc import DvcResource
from assets.launch import Launcher, launch_resource
from assets.launchpad import plan_resource
from assets.recipes import RecipePage
from prts_core.io.errors import lookup

ENVIRONMENTS = ("local", "test")


def resources(pages: Sequence[RecipePage], outputs: Path, launch: str | None = None) -> dict[str, Any]:
    """local: one machine, outputs entered into DVC. test: the same without DVC.

    launch: where stages run; by default what $PRTS_LAUNCH says, else each in a process of its own.
    """
    chosen = os.environ.get("PRTS_ENV", "local")
    lookup({known: known for known in ENVIRONMENTS}, chosen, "environment ($PRTS_ENV)")
    where = launch or os.environ.get("PRTS_LAUNCH") or "process"
    return {
        **{page.resource: plan_resource(page, outputs) for page in pages},
        "launch": launch_resource(Launcher(where)),
        "dvc": dg.ResourceDefinition.hardcoded_resource(DvcResource(enabled=chosen == "local")),
    }
