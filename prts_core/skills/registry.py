"""Install skill packages for this user, and find those that are installed.

`<data>/prts/skills/<owner>/<name>/` (data = $XDG_DATA_HOME or ~/.local/share) holds the package in a folder named by
its digest, and `installed.json`, written last: a place without it is not installed. Writers of one skill wait for each
other; readers see the old package or the new one, and a record that cannot be read is an error, not an absence.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prts_core.config.checked_yaml import check
from prts_core.config.checks import Lenient
from prts_core.io.errors import ConfigError, DataError, PrtsError, suggest
from prts_core.io.files import digest_value, explain_os_errors, link_or_copy, new_folder, read_json, write_json
from prts_core.io.locks import locked
from prts_core.skills.digests import FILE as DIGESTS
from prts_core.skills.digests import folder_digests, package_digest, package_files
from prts_core.skills.evaluations import verify_evaluations
from prts_core.skills.fetch import SKILL, fetch_package
from prts_core.skills.manifest.weights import hub_parts
from prts_core.skills.signature import verify
from prts_core.skills.weights import weights_folder

RECORD = "installed.json"


def skills_home() -> Path:
    """Where this user's skills lie."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "prts" / "skills"


@dataclass(frozen=True)
class Installed(Lenient):
    """One installed skill. folder: its package, below the skill's place. revision: the hub's commit, where it came from
    there. weights: the digest of weights that lie on the hub, outside the package."""

    name: str
    version: str
    kind: str
    license: str
    role: str
    embodiment_tags: tuple[str, ...]
    source: str
    revision: str | None
    digest: str
    folder: str
    installed_at: str
    weights: str | None = None

    def package(self, home: Path | None = None) -> Path:
        return _place(self.name, home or skills_home()) / self.folder

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- what is there ---------------------------------------------------------------------------------------------------
def installed(home: Path | None = None) -> list[Installed]:
    """Every installed skill, by name. DataError for a record that cannot be read."""
    records = (_read(path) for path in sorted((home or skills_home()).glob(f"[!.]*/*/{RECORD}")))
    return [record for record in records if record is not None]


def find(reference: str, home: Path | None = None) -> Installed:
    """An installed skill by its id, rskill://id, or the id's last word with or without "rskill-". ConfigError that
    lists what is there."""
    known = {record.name: record for record in installed(home)}
    wanted = reference.removeprefix(SKILL)
    short = [record for name, record in known.items() if wanted in (name, *_short(name))]
    if wanted in known or len(short) == 1:
        return known.get(wanted) or short[0]
    near = suggest(wanted, [*known, *(word for name in known for word in _short(name))])
    problem = "Several skills have this name" if short else f"No skill {wanted!r} is installed{near}"
    raise ConfigError(
        problem,
        field="skill",
        found=reference,
        expected=", ".join(record.name for record in short or known.values()) or "no skill is installed",
        cure="name the owner too" if short else "`prts skill list` shows what is installed; or give a folder",
    )


def remove(name: str, home: Path | None = None) -> bool:
    """Remove an installed skill, sound or not, given its id; whether there was one."""
    home = home or skills_home()
    place = _place(name, home)
    if not place.is_dir():
        return False
    with locked(_lock(name, home)):
        (place / RECORD).unlink(missing_ok=True)  # first: half a package is not installed
        shutil.rmtree(place)
    return True


# ---- putting one there -----------------------------------------------------------------------------------------------
def install(
    source: str,
    *,
    commercial_use: bool = True,
    trusted: Path | None = None,
    home: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Installed, tuple[str, ...]]:
    """Install a package from a folder, hf://owner/name[@revision], or rskill://name; with notes for the user.

    The manifest comes first and alone; the package and its weights are fetched once it is sound, no template, of a kind
    that something can load, and allowed by its licence. An installed skill of the same id is replaced. trusted: a
    public key or a folder of them, one of which must have signed the package.

    Raises ConfigError, DataError and CheckpointError for what is wrong with the package; StageError for a full disk.
    """
    home = home or skills_home()
    package, manifest, revision, notes = fetch_package(
        source, commercial_use=commercial_use, trusted=trusted, environ=environ
    )
    on_hub = revision is not None
    lies = weights_folder(manifest, package)
    weights = folder_digests(lies) if lies is not None and hub_parts(manifest.weights_uri or "") else {}
    with explain_os_errors(home):
        digest = package_digest(package)
    verify_evaluations(package, digest)
    if trusted is not None or (package / DIGESTS).exists():
        verify(package, trusted)
    record = Installed(
        name=manifest.name,
        version=manifest.version,
        kind=manifest.kind,
        license=manifest.license,
        role=manifest.role,
        embodiment_tags=tuple(manifest.embodiment_tags),
        source=source if on_hub else str(package.resolve()),
        revision=revision,
        digest=digest,
        folder=digest.removeprefix("sha256:")[:16],
        installed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        weights=digest_value(weights) if weights else None,
    )
    _put(record, package, home, linked=on_hub)
    return record, notes


def _put(record: Installed, package: Path, home: Path, *, linked: bool) -> None:
    place = _place(record.name, home)
    target = place / record.folder
    with locked(_lock(record.name, home)):
        if not (target.is_dir() and folder_digests(target) == folder_digests(package)):  # its records may be newer
            shutil.rmtree(target, ignore_errors=True)  # damaged
            with new_folder(target) as partial:
                for path in package_files(package):
                    if not linked and not path.resolve().is_relative_to(package.resolve()):
                        raise DataError(
                            "A package holds a link to what is not in it",
                            file=path,
                            found=str(path.readlink()) if path.is_symlink() else str(path.resolve()),
                            expected="files of its own",
                            cure="put the file itself there",
                        )
                    copy = partial / path.relative_to(package)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    (link_or_copy if linked else shutil.copy2)(path.resolve(), copy)
                if package_digest(partial) != record.digest:
                    raise DataError("A package changed while it was copied", file=package, cure="install it again")
        write_json(place / RECORD, record.to_json())
        for other in place.iterdir():
            if other.is_dir() and other != target:
                shutil.rmtree(other)


def _place(name: str, home: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII) or name.endswith(("/.", "/..")):
        raise ConfigError("This is no skill's id", field="skill", found=name, expected="owner/name")
    return home / name


def _lock(name: str, home: Path) -> Path:
    return home / ".locks" / name.replace("/", ".")


def _short(name: str) -> tuple[str, str]:
    last = name.split("/")[1]
    return last, last.removeprefix("rskill-")


def _read(path: Path) -> Installed | None:
    """One record; none where it was removed meanwhile."""
    try:
        return check(Installed, read_json(path), path, what="record of an installed skill")
    except PrtsError as err:
        if not path.exists():
            return None
        raise DataError(
            "The record of an installed skill cannot be read",
            file=path,
            found=err.found,
            cure=f"`prts skill remove {path.parent.parent.name}/{path.parent.name}`, then install it again",
        ) from err
