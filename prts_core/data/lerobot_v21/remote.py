"""Open LeRobot datasets that lie in object storage: metadata at once, tables and videos episode by episode.

A dataset that was taken over from there keeps meta/remote.json: the URL, and which files it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from prts_core.data.lerobot_v21.v30 import (
    EPISODES_PATH,
    FILES_A_CHUNK,
    STATS_PATH,
    TASKS_PATH,
    VERSIONS,
    episode_tables,
    is_v30,
)
from prts_core.io.errors import DataError, PrtsError
from prts_core.io.files import atomic_path, digest_value, link_or_copy, read_json, write_json
from prts_core.io.object_storage import METADATA, RemoteFile, RemoteFolder

REMOTE = "meta/remote.json"
_CONTRACT = "meta/contract.json"
_V21 = ("meta/episodes.jsonl", "meta/tasks.jsonl", "meta/episodes_stats.jsonl")


def metadata_of(root: Path) -> list[str]:
    """The files under meta/ that LeRobot reads, below `root`."""
    if is_v30(root):
        tables = [path.relative_to(root).as_posix() for path in episode_tables(root)]
        names = [*tables, TASKS_PATH, STATS_PATH]
    else:
        names = list(_V21)
    return [name for name in names if (root / name).is_file()]


def mirror(url: str) -> tuple[RemoteFolder, Path]:
    """The folder at `url`, and a local one with its metadata as it is there now: other metadata is another folder."""
    remote = RemoteFolder(url)
    files = {"meta/info.json": remote.fetch("meta/info.json")}
    info = read_json(files["meta/info.json"])
    if isinstance(info, dict) and info.get("codebase_version") in VERSIONS:
        needed, optional = [TASKS_PATH], [STATS_PATH, _CONTRACT]
        while True:  # without a listing, which HTTP does not give
            number = len(needed) - 1
            table = EPISODES_PATH.format(chunk_index=number // FILES_A_CHUNK, file_index=number % FILES_A_CHUNK)
            if number and not remote.exists(table):
                break
            needed.append(table)
    else:
        needed, optional = list(_V21[:2]), [_V21[2], _CONTRACT]
    files |= {name: remote.fetch(name) for name in [*needed, *filter(remote.exists, optional)]}
    version = digest_value({name: path.name for name, path in files.items()}).removeprefix("sha256:")[:20]
    root = remote.root / METADATA / version
    for name, path in files.items():
        if not (root / name).is_file():
            with atomic_path(root / name) as partial:
                link_or_copy(path, partial)
    return remote, root


def remote_of(root: Path) -> RemoteFolder | None:
    """Where the tables and videos of the dataset at `root` lie; none: beside its metadata."""
    path = root / REMOTE
    if not path.is_file():
        return None
    raw = read_json(path)
    try:
        pinned = {str(name): RemoteFile(int(one["size"]), str(one["version"])) for name, one in raw["files"].items()}
        return RemoteFolder(str(raw["url"]), pinned)
    except PrtsError:  # of the URL
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        expected = "url, files {name: {size, version}}"
        raise DataError(
            "A dataset does not say where its files lie", file=path, expected=expected, cure="run `prts convert` again"
        ) from err


def write_remote(root: Path, url: str, files: Mapping[str, RemoteFile]) -> None:
    """Say that the tables and videos of the dataset at `root` are these files of `url`.

    DataError where the store has no tag of one: another file in its place would not be noticed.
    """
    nameless = next((name for name, one in files.items() if not one.version), None)
    if nameless is not None:
        problem, cure = (
            "Object storage does not tell one version of a file from another",
            "take it over with `link: copy`",
        )
        raise DataError(problem, file=f"{url}/{nameless}", expected="an ETag, hash or generation", cure=cure)
    write_json(root / REMOTE, {"url": url, "files": {name: asdict(one) for name, one in files.items()}})
