"""From a model's name to a policy on this disk that is what its package says: a path, `models:/name@alias`,
`hf://owner/name@revision` or `rskill://name`.

It knows packages, the registry, the hub and installed skills, not the policy inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prts_core.delivery.verify import Verified, is_package, verify_package
from prts_core.io.errors import CheckpointError
from prts_core.io.hub import local_folder
from prts_core.skills.digests import SIGNATURE
from prts_core.skills.fetch import HUB, SKILL, fetch_package, hub_source
from prts_core.skills.manifest import FILE
from prts_core.skills.registry import find
from prts_core.skills.weights import BRANCH
from prts_core.store.listing import list_files, tree_digest

CONTRACT = "policy_contract.json"  # what every policy folder of ours has


@dataclass(frozen=True)
class ResolvedModel:
    """A verified package. policy: the folder to load, as a rule the package's own. package_digest: what records of
    evaluations name it by. content_digest: over every file but the signature, as the store and the registry have it;
    the list of digests is among them, and so are weights that lie elsewhere. budget_ms: for a chunk. version: of the
    registered model, if it is one."""

    reference: str
    folder: Path
    policy: Path
    package_digest: str
    content_digest: str
    budget_ms: float
    version: str | None = None


def resolve(reference: str, outputs: Path = Path("outputs"), trusted: Path | None = None) -> ResolvedModel:
    """Find the package that `reference` names and verify every file of it before anything is loaded.

    reference: a package folder, `models:/<name>@<alias>`, `models:/<name>/<version>`, `hf://owner/name[@revision]`,
    or `rskill://name` of an installed skill. outputs: whose registry is asked when MLFLOW_TRACKING_URI is not set.
    trusted: a public key or a folder of them, one of which must have signed the package.

    Raises CheckpointError for a damaged package, StageError or ConfigError for an unknown name.
    """
    from prts_core.delivery import registry

    if registry.is_reference(reference):
        return _registered(reference, outputs, trusted)
    if reference.startswith(SKILL):
        folder = find(reference).package()
    elif reference.startswith(HUB):
        folder = fetch_package(reference, trusted=trusted)[0]
    else:
        folder = Path(reference).expanduser()
    found = verify_package(folder, trusted)
    return ResolvedModel(reference, folder, _policy(found), found.package_digest, _content(folder), found.budget_ms)


def _registered(reference: str, outputs: Path, trusted: Path | None) -> ResolvedModel:
    from prts_core.delivery import registry
    from prts_core.tracking.store import client

    version = registry.resolve_version(client(outputs), reference)
    folder = registry.version_files(outputs, version, registry.PACKAGE)
    found = verify_package(folder, trusted)
    digest, recorded = _content(folder), registry.content_digest_of(version)
    if digest != recorded:
        raise CheckpointError(
            "A registered package is not the one that was registered",
            file=folder,
            found=digest,
            expected=recorded,
            cure="run `prts register` again, or serve another version",
        )
    number = str(version.version)
    return ResolvedModel(reference, folder, _policy(found), found.package_digest, digest, found.budget_ms, number)


def _policy(found: Verified) -> Path:
    if not (found.policy / CONTRACT).is_file():
        raise CheckpointError(
            "The weights of this package are in a format that nothing here loads",
            file=found.policy,
            found=", ".join(sorted(path.name for path in found.policy.iterdir())[:8]),
            expected=f"a policy folder, with {CONTRACT}",
            cure="`prts import-policy` makes one of a checkpoint of the public PRTS release; package that",
        )
    return found.policy


def _content(folder: Path) -> str:
    """One digest for a package, whoever signed it."""
    return tree_digest([file for file in list_files(folder) if file.path != SIGNATURE])


def version_of(reference: str, outputs: Path = Path("outputs")) -> str:
    """The version that `models:/<name>@<alias>` means now, nothing of it read. StageError for an unknown name."""
    from prts_core.delivery import registry
    from prts_core.tracking.store import client

    return str(registry.resolve_version(client(outputs), reference).version)


def policy_folder(reference: str, outputs: Path = Path("outputs")) -> Path:
    """The folder to load a policy from: a policy folder as it is, here or on the hub; anything else once verified."""
    plain = plain_policy(reference)
    return resolve(reference, outputs).policy if plain is None else plain


def plain_policy(reference: str) -> Path | None:
    """The policy folder that `reference` names where it is no package, fetched if it lies on the hub; none for the
    name of a package, of a registered model or of an installed skill."""
    from prts_core.delivery.registry import is_reference

    if is_reference(reference) or reference.startswith(SKILL):
        return None
    folder = Path(reference).expanduser()
    if not reference.startswith(HUB):
        return None if is_package(folder) else folder
    repository, revision = hub_source(reference)
    named = f"{repository}@{revision or BRANCH}"
    first = local_folder(named, [FILE, CONTRACT])
    if (first / FILE).is_file() or not (first / CONTRACT).is_file():
        return None
    return local_folder(f"{repository}@{first.name}", ["*.json", "*.safetensors"])
