"""From a model's name to a folder on this disk that is what its manifest says: a path, or `models:/name@alias`.

It knows packages and the registry, not the policy inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prts_core.delivery.verify import is_package, verify_package
from prts_core.io.errors import CheckpointError
from prts_core.store.listing import digest_tree


@dataclass(frozen=True)
class ResolvedModel:
    """A verified package. budget_ms: for a chunk. version: of the registered model, none for a plain folder."""

    reference: str
    folder: Path
    package_digest: str
    budget_ms: float
    version: str | None = None


def resolve(reference: str, outputs: Path = Path("outputs"), trusted: Path | None = None) -> ResolvedModel:
    """Find the package that `reference` names and verify every file of it before anything is loaded.

    reference: a package folder, `models:/<name>@<alias>` or `models:/<name>/<version>`. outputs: whose registry is
    asked when MLFLOW_TRACKING_URI is not set. trusted: a public key or a folder of them, one of which must have signed
    it.

    Raises CheckpointError for a damaged package, StageError for an unknown name.
    """
    from prts_core.delivery import registry

    if not registry.is_reference(reference):
        folder = Path(reference).expanduser()
        budget = verify_package(folder, trusted).budget_ms
        return ResolvedModel(reference, folder, digest_tree(folder), budget)

    from prts_core.tracking.store import client

    version = registry.resolve_version(client(outputs), reference)
    folder = registry.version_files(outputs, version, registry.PACKAGE)
    budget = verify_package(folder, trusted).budget_ms
    digest = digest_tree(folder)
    recorded = version.tags.get("prts.package_digest")
    if digest != recorded:
        raise CheckpointError(
            "A registered package is not the one that was registered",
            file=folder,
            found=digest,
            expected=recorded,
            cure="run `prts register` again, or serve another version",
        )
    return ResolvedModel(reference, folder, digest, budget, str(version.version))


def version_of(reference: str, outputs: Path = Path("outputs")) -> str:
    """The version that `models:/<name>@<alias>` means now, nothing of it read. StageError for an unknown name."""
    from prts_core.delivery import registry
    from prts_core.tracking.store import client

    return str(registry.resolve_version(client(outputs), reference).version)


def policy_folder(reference: str, outputs: Path = Path("outputs")) -> Path:
    """The folder to load a policy from: a policy folder as it is, a package or a registered model once verified."""
    from prts_core.delivery.registry import is_reference

    folder = Path(reference).expanduser()
    if is_reference(reference) or is_package(folder):
        return resolve(reference, outputs).folder
    return folder
