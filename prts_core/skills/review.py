"""Look a package over: may it be installed, are its records sound and its own, does it fit these robots?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prts_core.config.checked_yaml import read_yaml
from prts_core.io.errors import PrtsError
from prts_core.skills.admission import GATES, Request
from prts_core.skills.compatibility import Check, Compatibility, compatibility
from prts_core.skills.evaluations import FOLDER, package_digest, read_evaluation, verify_evaluation
from prts_core.skills.manifest import check_manifest, ignored_keys, manifest_path
from prts_core.skills.notes import notes
from prts_core.skills.robot import Robot


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
    package: Path, robots: Sequence[Robot] = (), *, commercial_use: bool = True, digest: str | None = None
) -> Review:
    """Look over a package, given its folder or its manifest. digest: what its files had when it was installed.

    Raises ConfigError where the manifest itself is not sound: nothing else can be said then.
    """
    path = manifest_path(package)
    raw = read_yaml(path, "skill manifest")
    manifest = check_manifest(raw, path)
    said = [f"{key} is ignored: the schema has no such key" for key in ignored_keys(raw)] + [*notes(manifest)]
    checks = [Check("manifest", "passed")]
    for name, gate in GATES.items():
        try:
            said += gate(Request(manifest, path, commercial_use))
            checks.append(Check(name, "passed"))
        except PrtsError as err:
            checks.append(Check(name, "failed", (_told(err),)))
    if path.parent.is_dir():
        checks.append(_records(path.parent))
    if digest is not None:
        same = package_digest(path.parent) == digest
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
    files = sorted((package / FOLDER).glob("*.json"))
    faults, digest = [], ""
    for path in files:
        try:
            record = read_evaluation(path)
            if record.is_bound:
                digest = digest or package_digest(package)
                verify_evaluation(record, digest, path)
        except PrtsError as err:
            faults.append(f"{FOLDER}/{path.name}: {_told(err)}")
    if not files:
        return Check("evaluations", "unknown", ("the package has no record of an evaluation",))
    return Check("evaluations", "failed" if faults else "passed", tuple(faults))


def _told(err: PrtsError) -> str:
    return "; ".join(str(part) for part in (err.problem, err.found, err.cure) if part is not None)
