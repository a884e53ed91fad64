"""manifest.yaml of a packaged policy: what it is, may be used for, needs and has been measured to do.

Checked by pydantic on reading; the field names follow openral's rSkill manifest where it has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prts_core.config.checked_yaml import read_yaml
from prts_core.io.errors import CheckpointError
from prts_core.io.files import write_text

FILE = "manifest.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatencyBudget(_Strict):
    """per_chunk_ms: one call for one chunk, on the hardware named beside it."""

    per_chunk_ms: float = Field(gt=0)
    measured_ms: float | None = None
    hardware: str | None = None


class Evaluation(_Strict):
    """One benchmark of exactly this policy (see `policy_digest`)."""

    suite: str
    protocol: str
    success_rate: float = Field(ge=0, le=1)
    episodes: int = Field(gt=0)
    results: dict[str, Any]


class PackageManifest(_Strict):
    schema_version: Literal["0.1"] = "0.1"
    name: str
    version: str
    kind: Literal["vla"] = "vla"
    licence: str
    description: str = Field(min_length=1, max_length=500)
    model_family: str = "prts"
    embodiment_tags: tuple[str, ...] = Field(min_length=1)
    capabilities: tuple[str, ...]
    chunk_size: int = Field(gt=0)
    n_action_steps: int = Field(gt=0)
    runtime: Literal["pytorch"] = "pytorch"
    latency_budget: LatencyBudget
    contract_fingerprint: str
    policy_digest: str
    files: dict[str, str]
    evaluations: tuple[Evaluation, ...]

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110))

    @staticmethod
    def load(folder: Path) -> PackageManifest:
        try:
            return PackageManifest.model_validate(read_yaml(folder / FILE))
        except ValidationError as err:
            faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in err.errors()[:6])
            raise CheckpointError("A package manifest is malformed", file=folder / FILE, found=faults) from err
