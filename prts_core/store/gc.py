"""Find what nothing refers to in a store, and remove it.

Referred to are: what recipes' views show, the plans that are given, what is registered, work that is running or
younger than the stated age, results younger than that age, and all that these were made from.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prts_core.config.load import RunPlan
from prts_core.io.errors import Skipped, UnavailableError
from prts_core.io.locks import locked, try_locked
from prts_core.store.entries import WORK, Entry, all_entries, with_ancestors
from prts_core.store.listing import cached_root
from prts_core.store.manifest import MANIFEST, STORE
from prts_core.store.run_stage import GC_LOCK, Resolved, Store
from prts_core.store.views import all_views

TRASH = ".trash"
DAY_S = 86400.0


@dataclass(frozen=True)
class Removable:
    """Something that may go. what: "result", "work" (interrupted, too old), "leftover" (of a kill, or work that was
    put aside) or "cache" (digests of a source that is no longer there). bytes: what removing it alone would free."""

    what: Literal["result", "work", "leftover", "cache"]
    path: Path
    stage: str
    partition: str | None
    key: str
    age_days: float
    bytes: int
    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Garbage:
    """What may go, and why the rest stays. bytes: freed by removing all of it; what views or others hold by hard links
    is not freed. kept: reason -> number of results."""

    items: tuple[Removable, ...]
    bytes: int
    kept: dict[str, int]
    keep_days: float
    deleted: bool = False

    def to_json(self) -> dict[str, Any]:
        rows = [asdict(item) | {"path": str(item.path)} for item in self.items]
        return asdict(self) | {"items": rows}


def plan_keys(store: Store, plan: RunPlan, steps: Iterable[tuple[str, str | None]]) -> tuple[set[str], list[str]]:
    """Keys of every step of a plan, and a note for each whose source is not here: only its view keeps those."""
    known: dict[tuple[str, str | None], Resolved] = {}
    notes = []
    for stage, partition in steps:
        try:
            store.resolve(stage, plan, partition, known=known)
        except (Skipped, UnavailableError) as err:
            if store.stages[stage].external and not store.stages[stage].parents(plan, partition):
                notes.append(f"{plan.recipe.name}: {err.problem}; what was made of it stays only if a view shows it")
    return {resolved.key for resolved in known.values()}, notes


def find_garbage(
    outputs: Path, *, keys: set[str], registered: set[str], keep_days: float, now: float | None = None
) -> Garbage:
    """What may go. keys: of the plans to keep. registered: keys or manifest digests of registered packages."""
    now = time.time() if now is None else now
    entries = {entry.key: entry for entry in all_entries(outputs)}
    roots: dict[str, set[str]] = {
        "recipes show": set(),
        "plans": keys,
        "registered": set(),
        "work": set(),
        "age": set(),
    }
    for _, raw in all_views(outputs):
        roots["recipes show"] |= {raw.get("key", ""), *raw.get("parents", {}).values()}
    digests = {name for name in registered if name.startswith("sha256:")}
    ages = {key: _age(entry, now) for key, entry in entries.items()}
    for key, entry in entries.items():
        if key in registered or (digests and entry.finished and entry.manifest.get("digest") in digests):
            roots["registered"].add(key)
        if (not entry.finished and entry.running) or (entry.interrupted and ages[key] <= keep_days):
            roots["work"] |= {key, *(parent for _, parent in entry.plan.get("parents", {}).values())}
        elif entry.finished and ages[key] <= keep_days:
            roots["age"].add(key)
    kept, stays = {}, set[str]()
    for reason, named in roots.items():
        whole = with_ancestors(named, entries)
        kept[reason] = sum(entries[key].finished for key in whole - stays if key in entries)
        stays |= whole
    links: dict[tuple[int, int], list[int]] = {}
    items = []
    for key, entry in entries.items():
        if key not in stays and not entry.running:
            what: Any = "result" if entry.finished else "work" if entry.interrupted else "leftover"
            items.append(_item(what, entry.folder, entry, ages[key], links))
            continue
        for name in entry.names:
            left = entry.folder / name
            over = name == ".done" or (name == WORK and entry.finished)
            if (over or name.startswith(f"{WORK}-")) and not entry.running:
                age = _tree_age(left, now)
                if over or age > keep_days:
                    items.append(_item("leftover", left, entry, age, links))
    for cache in sorted((outputs / STORE / ".sources").glob("*.tsv")):
        root, age = cached_root(cache), (now - cache.stat().st_mtime) / DAY_S
        if root is not None and not root.exists() and age > keep_days:
            items.append(Removable("cache", cache, "", None, "", age, cache.stat().st_size, str(root), ()))
    freed = sum(size for size, count, there in links.values() if count >= there)
    freed += sum(item.bytes for item in items if item.what == "cache")
    return Garbage(tuple(items), freed, kept, keep_days)


def delete_garbage(
    outputs: Path, *, keys: set[str], registered: set[str], keep_days: float, on_wait: Callable[[], None] | None = None
) -> Garbage:
    """Remove what may go and say what that was. Runs that look for their parents wait meanwhile, a moment: everything
    is first moved out of the way, then removed."""
    trash = outputs / STORE / TRASH
    moved = set[Removable]()
    with locked(outputs / STORE / GC_LOCK, on_wait=on_wait):
        found = find_garbage(outputs, keys=keys, registered=registered, keep_days=keep_days)
        trash.mkdir(parents=True, exist_ok=True)
        entries = {entry.key: entry for entry in all_entries(outputs)}
        # Children before their parents: a collection that is killed half-way leaves no result whose parents are gone.
        for item in sorted(found.items, key=lambda item: -len(with_ancestors({item.key}, entries))):
            if item.what == "cache":
                item.path.unlink(missing_ok=True)
                item.path.with_suffix(".json").unlink(missing_ok=True)  # the pictures that an image-text file names
                moved.add(item)
            elif _move_away(item, trash):
                moved.add(item)
    for left in list(trash.iterdir()):  # with what a killed collection left
        shutil.rmtree(left, ignore_errors=True)  # another collection may be removing it too
    return Garbage(
        tuple(item for item in found.items if item in moved), found.bytes, found.kept, keep_days, deleted=True
    )


def _move_away(item: Removable, trash: Path) -> bool:
    """Rename an item into the trash; False where a process works on its entry, or has since it was listed."""
    whole = item.path.name == item.key
    entry = item.path if whole else item.path.parent
    with try_locked(entry / ".lock") as free:
        if not free or not item.path.exists() or (whole and (entry / MANIFEST).exists() != (item.what == "result")):
            return False
        item.path.rename(trash / f"{item.stage}-{item.key}-{item.path.name}-{time.time_ns()}")
        return True


def _item(what: Any, path: Path, entry: Entry, age: float, links: dict[tuple[int, int], list[int]]) -> Removable:
    own: dict[tuple[int, int], list[int]] = {}
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                info = Path(folder, name).lstat()
            except FileNotFoundError:  # a stage that ends tidies up meanwhile
                continue
            inode = (info.st_dev, info.st_ino)
            for table in (own, links):
                table.setdefault(inode, [info.st_size, 0, info.st_nlink])[1] += 1
    about = entry.provenance if what == "result" else entry.plan
    freed = sum(size for size, count, there in own.values() if count >= there)
    return Removable(
        what,
        path,
        entry.stage,
        entry.partition,
        entry.key,
        age,
        freed,
        about.get("recipe", ""),
        tuple(about.get("overrides", ())),
    )


def _age(entry: Entry, now: float) -> float:
    """Days since a result was last asked for, or since anything was written into unfinished work."""
    try:
        if entry.finished:
            return (now - (entry.folder / MANIFEST).stat().st_mtime) / DAY_S
        return _tree_age(entry.folder / WORK if entry.interrupted else entry.folder, now)
    except FileNotFoundError:
        return 0.0


def _tree_age(root: Path, now: float) -> float:
    """Days since the newest file or folder under `root` was changed; 0 where it goes away meanwhile."""
    newest = 0.0
    for folder, folders, names in os.walk(root):
        for path in (Path(folder), *(Path(folder, name) for name in (*folders, *names))):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, path.lstat().st_mtime)
    return (now - newest) / DAY_S if newest else 0.0
