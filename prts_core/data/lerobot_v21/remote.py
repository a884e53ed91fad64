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
from prts_core.io.files import read_json, write_json
from prts_core.io.object_storage import RemoteFile, RemoteFolder

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


def mirror(url: str) -> RemoteFolder:
    """The folder at `url`, its metadata on the local disk as it is there now."""
    remote = RemoteFolder(url)
    info = read_json(remote.fetch("meta/info.json"))
    if isinstance(info, dict) and info.get("codebase_version") in VERSIONS:
        remote.fetch(TASKS_PATH)
        optional = [STATS_PATH, _CONTRACT]
        number = 0
        while True:  # without a listing, which HTTP does not give
            place = {"chunk_index": number // FILES_A_CHUNK, "file_index": number % FILES_A_CHUNK}
            if number and not remote.exists(EPISODES_PATH.format(**place)):
                break
            remote.fetch(EPISODES_PATH.format(**place))
            number += 1
        for path in sorted((remote.root / "meta/episodes").glob("*/*.parquet"))[number:]:
            path.unlink()  # of a longer dataset that was there before
    else:
        remote.fetch(_V21[0])
        remote.fetch(_V21[1])
        optional = [_V21[2], _CONTRACT]
    for name in optional:
        if remote.exists(name):
            remote.fetch(name)
        else:
            (remote.root / name).unlink(missing_ok=True)
    return remote


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
    """Say that the tables and videos of the dataset at `root` are these files of `url`."""
    write_json(root / REMOTE, {"url": url, "files": {name: asdict(one) for name, one in files.items()}})
