"""Find skills by what they do: words of their description, verbs, objects, scenes, robots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prts_core.io.errors import PrtsError
from prts_core.skills.compatibility import compatibility
from prts_core.skills.manifest import FILE, Manifest, read_manifest
from prts_core.skills.robot import Robot


@dataclass(frozen=True)
class Found:
    """Skills that fit, by name. unread: packages whose manifest is not sound, file and fault."""

    skills: tuple[tuple[Manifest, Path], ...]
    unread: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": skill.name,
                "version": skill.version,
                "kind": skill.kind,
                "license": skill.license,
                "description": skill.description.strip(),
                "actions": list(skill.actions),
                "embodiment_tags": list(skill.embodiment_tags),
                "package": str(package),
            }
            for skill, package in self.skills
        ]
        return {"skills": rows, "unread": [{"file": file, "fault": fault} for file, fault in self.unread]}


def search(words: Sequence[str], packages: Iterable[Path], robots: Sequence[Robot] = ()) -> Found:
    """Skills whose texts hold every word, in any order and case, and that fit all of these robots. Templates are
    offered to nobody; of two packages with one manifest, the first counts."""
    fit: list[tuple[Manifest, Path]] = []
    unread = []
    for package in packages:
        try:
            skill = read_manifest(package)
        except PrtsError as err:
            unread.append((str(package / FILE), str(err.found or err.problem)))
            continue
        text = _text(skill)
        if (
            not skill.is_template
            and all(skill != other for other, _ in fit)
            and all(word.lower() in text for word in words)
            and all(compatibility(skill, robot).ok for robot in robots)
        ):
            fit.append((skill, package))
    return Found(tuple(sorted(fit, key=lambda one: one[0].name)), tuple(unread))


def packages_under(folder: Path) -> list[Path]:
    """Every package folder in a tree of them, such as a checkout."""
    return sorted(path.parent for path in folder.rglob(FILE))


def _text(skill: Manifest) -> str:
    said = [skill.name, skill.kind, skill.description, skill.model_family or "", *skill.embodiment_tags]
    return "\n".join([*said, *skill.actions, *skill.objects, *skill.scenes]).lower()
