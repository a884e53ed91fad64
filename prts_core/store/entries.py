"""Look over every entry of a store without reading what it holds, and say how two results differ.

An entry is `store/<stage>/<key>/`. Only names are listed, ten thousand entries in a tenth of a second; a manifest or
provenance is read when it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prts_core.config.places import outputs_folder
from prts_core.io.errors import PrtsError
from prts_core.io.files import read_json
from prts_core.io.locks import is_locked
from prts_core.store.manifest import MANIFEST, OUTPUT, PROVENANCE, STORE

WORK = "work"
# Fields of the outermost object, as `files.write_json` indents it.
_PARENTS, _BYTES = re.compile(r'\n  "parents": (\{[^}]*\})'), re.compile(r'\n  "bytes": (\d+)')
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Entry:
    """One folder of the store, as a string: ten thousand paths take as long as all the rest. names: what lies in it."""

    place: str
    names: frozenset[str]

    @property
    def folder(self) -> Path:
        return Path(self.place)

    @property
    def stage(self) -> str:
        return self.place.rsplit("/", 2)[1]

    @property
    def key(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def finished(self) -> bool:
        return MANIFEST in self.names

    @property
    def interrupted(self) -> bool:
        """Whether work was begun and is not finished; it may be running."""
        return WORK in self.names and not self.finished

    @property
    def running(self) -> bool:
        return ".lock" in self.names and is_locked(self.folder / ".lock")

    @property
    def parents(self) -> dict[str, str]:
        """Role -> key of a finished result's parents, cut out of its manifest without reading all of it."""
        if "manifest" not in self.__dict__:
            text = _text(f"{self.place}/{MANIFEST}")
            if found := _PARENTS.search(text):
                return json.loads(found[1])
        return self.manifest.get("parents", {})

    @property
    def bytes(self) -> int:
        """Bytes of a finished result's output, as its provenance says."""
        found = _BYTES.search(_text(f"{self.place}/{PROVENANCE}"))
        return int(found[1]) if found else 0

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands, unchecked; empty where it cannot be read."""
        return _read(self.folder / MANIFEST)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return _read(self.folder / PROVENANCE)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the work under way is; empty where there is none."""
        return _read(self.folder / WORK / "plan.json")

    @property
    def partition(self) -> str | None:
        return (self.manifest if self.finished else self.plan).get("partition")

    @property
    def checkpoint(self) -> int | None:
        """Step of the newest checkpoint of the work, if there is one."""
        try:
            names = _names(self.folder / WORK / "checkpoints")
        except OSError:
            return None
        return max((int(m[1]) for m in map(_CHECKPOINT.fullmatch, names) if m), default=None)

    @property
    def spent(self) -> float:
        """Seconds of the interrupted work until now."""
        return float(_read(self.folder / WORK / "clock.json").get("seconds", 0.0))


def entry_at(folder: Path | str) -> Entry:
    try:
        return Entry(str(folder), frozenset(_names(folder)))
    except OSError:
        return Entry(str(folder), frozenset())


def all_entries(outputs: Path) -> Iterator[Entry]:
    """Every entry, stages and keys in order."""
    root = str(outputs / STORE)
    for stage in sorted(_folders(root)):
        for key in sorted(_folders(f"{root}/{stage}")):
            yield entry_at(f"{root}/{stage}/{key}")


def with_ancestors(keys: Iterable[str], entries: dict[str, Entry]) -> set[str]:
    """`keys` and the keys of all that they were made from, as far as the store has them."""
    waiting, seen = list(keys), set()
    while waiting:
        key = waiting.pop()
        if key not in seen:
            seen.add(key)
            if key in entries and entries[key].finished:
                waiting += entries[key].parents.values()
    return seen


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How the inputs of two results differ, one line each, their parents left out. Both are manifests' fields."""
    lines = []
    if old["version"] != new["version"]:
        lines.append(f"behaviour version {old['version']} -> {new['version']}")
    if old["seed"] != new["seed"]:
        lines.append(f"seed {old['seed']} -> {new['seed']}")
    if old.get("partition") != new.get("partition"):
        lines.append(f"dataset {old.get('partition')} -> {new.get('partition')}")
    left, right = flat(old["config"]), flat(new["config"])
    for name in {**left, **right}:
        before, after = (
            json.dumps(side[name], ensure_ascii=False) if name in side else "nothing" for side in (left, right)
        )
        if before != after:
            lines.append(f"config {name}: {_cut(before)} -> {_cut(after)}")
    return lines


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": value}; lists of mappings by their index, other lists whole."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for name, inner in items:
        out |= flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return out


def files_changed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, list[str]]:
    """{"added", "removed", "changed"} -> paths, of two listings [{path, size, sha256}]."""
    before = {row["path"]: row["sha256"] for row in old}
    after = {row["path"]: row["sha256"] for row in new}
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(path for path in before.keys() & after.keys() if before[path] != after[path]),
    }


def files_line(changed: dict[str, list[str]]) -> str:
    """ "sources: 3 files added, 1 changed (a/b.hdf5)"; the first path of the smallest group as an example."""
    parts = []
    for what, paths in changed.items():
        if paths:
            parts.append(
                f"{len(paths)} {'file' if len(paths) == 1 else 'files'} {what} ({paths[0]}"
                + (", ...)" if len(paths) > 1 else ")")
            )
    return "sources: " + (", ".join(parts) or "the same files in another order")


def listed_files(entries: dict[str, Entry], manifest: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The source files behind a result of collect or convert, as collect listed them; none where that is lost."""
    key = manifest["key"] if manifest["kind"] == "collect" else manifest["parents"].get("collect")
    path = entries[key].folder / OUTPUT / "files.json" if key in entries else None
    return read_json(path) if path is not None and path.is_file() else None


def work_command(plan: dict[str, Any], stage: str, outputs: Path) -> str:
    """The command that goes on with work of which plan.json tells."""
    words = ["prts", stage, "--config", str(plan.get("config_file", "?"))]
    words += ["--dataset", plan["partition"]] if plan.get("partition") else []
    for text in plan.get("overrides") or ():
        words += ["--set", text]
    words += ["--outputs", str(outputs)] if outputs.resolve() != outputs_folder().resolve() else []
    return shlex.join(words)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _names(folder: Path | str) -> list[str]:
    with os.scandir(folder) as found:
        return [item.name for item in found]


def _folders(root: str) -> list[str]:
    try:
        with os.scandir(root) as found:
            return [item.name for item in found if item.is_dir() and not item.name.startswith(".")]
    except FileNotFoundError:
        return []


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (PrtsError, OSError):
        return {}
    return value if isinstance(value, dict) else {}
