"""Show a recipe's present results at `outputs/runs/<recipe>/<stage>[/<dataset>]/`.

A view holds output/, manifest.json and metrics.json.
A view is a folder of hard links into the store. DVC keeps versions of views: `dvc checkout` unlinks files and writes
others in their place, which leaves the store as it is; through a symbolic link it would write into the store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prts_core.io.files import read_json, write_json
from prts_core.io.locks import locked
from prts_core.store.listing import walk
from prts_core.store.manifest import MANIFEST, OUTPUT, Manifest

RUNS = "runs"
METRICS = "metrics.json"


def view_folder(outputs: Path, recipe: str, stage: str, partition: str | None) -> Path:
    return outputs / RUNS / recipe / stage / (partition or "")


def viewed(outputs: Path, recipe: str, stage: str, partition: str | None) -> Manifest | None:
    """The manifest that a view shows, or none."""
    path = view_folder(outputs, recipe, stage, partition) / MANIFEST
    return Manifest.load(path) if path.is_file() and "skipped" not in read_json(path) else None


def show(view: Path, manifest: Manifest, outputs: Path, headline: Sequence[str] = ()) -> None:
    """Make the view show this result. Nothing is done where it does already. headline: metrics for metrics.json."""
    with locked(outputs / RUNS / ".lock"):
        if not _shows(view, manifest, outputs):
            new = _new(view)
            link_tree(manifest.folder(outputs), new / OUTPUT)
            write_json(new / METRICS, {name: manifest.metrics[name] for name in headline if name in manifest.metrics})
            manifest.save(new / MANIFEST)
            _swap(view, new)


def show_skipped(view: Path, reason: str, outputs: Path) -> None:
    """Make the view say why there is nothing: what DVC keeps of a dataset that is not here."""
    note = {"skipped": reason}
    with locked(outputs / RUNS / ".lock"):
        if not (view / MANIFEST).is_file() or read_json(view / MANIFEST) != note:
            new = _new(view)
            write_json(new / OUTPUT / "skipped.json", {"reason": reason})
            write_json(new / METRICS, {})
            write_json(new / MANIFEST, note)
            _swap(view, new)


def link_tree(source: Path, target: Path) -> None:
    """The files of `source` under `target`, as hard links; where a file system has none, as symbolic links."""
    target.mkdir(parents=True)
    for folder, _, names in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(exist_ok=True)
        for name in names:
            path = Path(folder) / name
            try:
                os.link(path, here / name)
            except OSError:
                (here / name).symlink_to(path.resolve())


def all_views(outputs: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, raw manifest) of every view."""
    found = []
    root = outputs / RUNS
    for path in sorted([*root.glob(f"*/*/{MANIFEST}"), *root.glob(f"*/*/*/{MANIFEST}")]):
        parts = path.relative_to(root).parts
        if OUTPUT not in parts and not any(part.startswith(".") for part in parts):  # what a kill left of a swap
            found.append((path.parent, read_json(path)))
    return found


def _shows(view: Path, manifest: Manifest, outputs: Path) -> bool:
    """Whether the view has this manifest and the very files of the store."""
    path = view / MANIFEST
    if not path.is_file() or read_json(path).get("digest") != manifest.digest:
        return False
    if not (view / OUTPUT).is_dir() or not (view / METRICS).is_file():
        return False
    ours, theirs = (walk(root) for root in (manifest.folder(outputs), view / OUTPUT))
    return [(name, info.st_ino) for name, info in ours] == [(name, info.st_ino) for name, info in theirs]


def _new(view: Path) -> Path:
    """A folder beside the view to build in; what a killed process left there is removed. The caller holds the lock."""
    for left in view.parent.glob(f".{view.name}.*"):
        shutil.rmtree(left)
    return view.with_name(f".{view.name}.new")


def _swap(view: Path, new: Path) -> None:
    """Put the content of `new` in the view's place. The manifest goes first and comes last: it says what is whole."""
    old = view.with_name(f".{view.name}.old")
    old.mkdir()
    view.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST, OUTPUT, METRICS):
        with contextlib.suppress(FileNotFoundError):
            (view / name).rename(old / name)
    for name in (METRICS, OUTPUT, MANIFEST):
        (new / name).rename(view / name)
    shutil.rmtree(old)
    shutil.rmtree(new)
