"""Look a package over: may it be installed, are its records sound and its own, does it fit these robots?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prts_core.config.checked_yaml import read_yaml
from prts_core.io.errors import PrtsError
from prts_core.io.files import digest_value
from prts_core.skills.admission import GATES, Request
from prts_core.skills.compatibility import Check, Compatibility, compatibility
from prts_core.skills.digests import EVALUATIONS, package_digest
from prts_core.skills.digests import FILE as DIGESTS
from prts_core.skills.evaluations import read_evaluation, verify_evaluation
from prts_core.skills.manifest import check_manifest, ignored_keys, manifest_path
from prts_core.skills.notes import notes
from prts_core.skills.robot import Robot
from prts_core.skills.signature import verify
from prts_core.skills.weights import hub_weights


@dataclass(frozen=True)
class Review:
    """What was found. notes: what is likely to be a mistake, or ought to be known; they fail nothing."""

    name: str
    version: str
    kind: str
    licence: str
    file: str
    checks: tuple[Check, ...]
    robots: tuple[Compatibility, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return all(check.state != "failed" for check in self.checks) and all(robot.ok for robot in self.robots)

    def to_json(self) -> dict[str, Any]:
        robots = [robot.to_json() for robot in self.robots]
        return asdict(self) | {"robots": robots, "ok": self.ok}


def review(
    package: Path,
    robots: Sequence[Robot] = (),
    *,
    commercial_use: bool = True,
    trusted: Path | None = None,
    digest: str | None = None,
    weights: str | None = None,
) -> Review:
    """Look over a package, given its folder or its manifest. digest, weights: what its files, and its weights on the
    hub, had when it was installed. trusted: public keys, one of which must have signed it.

    Raises ConfigError where the manifest itself is not sound: nothing else can be said then.
    """
    path = manifest_path(package)
    raw = read_yaml(path, "skill manifest")
    manifest = check_manifest(raw, path)
    said = [f"{key} is ignored: the schema has no such key" for key in ignored_keys(raw)] + [*notes(manifest)]
    checks = [Check("manifest", "passed")]
    for name, gate in GATES.items():
        try:
            said += gate(Request(manifest, path, commercial_use, trusted))
            checks.append(Check(name, "passed"))
        except PrtsError as err:
            checks.append(Check(name, "failed", (_told(err),)))
    if path.parent.is_dir():
        checks += [_records(path.parent), _listed(path.parent, trusted)]
    if digest is not None:
        same = package_digest(path.parent) == digest and weights in (None, digest_value(hub_weights(manifest)))
        told = () if same else ("the files are not those that were installed: install the skill again",)
        checks.append(Check("files", "passed" if same else "failed", told))
    return Review(
        name=manifest.name,
        version=manifest.version,
        kind=manifest.kind,
        licence=manifest.license,
        file=str(path),
        checks=tuple(checks),
        robots=tuple(compatibility(manifest, robot) for robot in robots),
        notes=tuple(said),
    )


def _records(package: Path) -> Check:
    files = sorted((package / EVALUATIONS).glob("*.json"))
    faults, digest = [], ""
    for path in files:
        try:
            record = read_evaluation(path)
            if record.is_bound:
                digest = digest or package_digest(package)
                verify_evaluation(record, digest, path)
        except PrtsError as err:
            faults.append(f"{EVALUATIONS}/{path.name}: {_told(err)}")
    if not files:
        return Check("evaluations", "unknown", ("the package has no record of an evaluation",))
    return Check("evaluations", "failed" if faults else "passed", tuple(faults))


def _listed(package: Path, trusted: Path | None) -> Check:
    """Files, and weights on the hub, against the package's own list; and who signed that."""
    if trusted is None and not (package / DIGESTS).exists():
        return Check("digests", "unknown", ("the package has no list of its files' digests",))
    try:
        verify(package, trusted)
    except PrtsError as err:
        return Check("digests", "failed", (_told(err),))
    return Check("digests", "passed")


def _told(err: PrtsError) -> str:
    return "; ".join(str(part) for part in (err.problem, err.found, err.cure) if part is not None)
