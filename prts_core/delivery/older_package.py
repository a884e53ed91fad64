"""Read packages of the form before rskill.yaml: manifest.yaml with the digests of its files, as registries hold them.

Nothing writes this form any more; `prts package` and `prts register` make the present one of the same policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.checks import Lenient
from prts_core.io.errors import CheckpointError, ConfigError

FILE = "manifest.yaml"
UNLISTED = (FILE, "README.md")  # the manifest cannot hold its own digest; the card is for people


@dataclass(frozen=True)
class Budget(Lenient):
    per_chunk_ms: float


@dataclass(frozen=True)
class OlderManifest(Lenient):
    """What of manifest.yaml is still read. files: path -> digest of every file but UNLISTED."""

    files: dict[str, str]
    latency_budget: Budget


def read_older(folder: Path) -> OlderManifest:
    path = folder / FILE
    try:
        return check(OlderManifest, read_yaml(path), path, what="package manifest")
    except ConfigError as err:
        cure = "run `prts package` again: it writes the present form"
        raise CheckpointError("A package manifest is malformed", file=path, found=err.found, cure=cure) from err
