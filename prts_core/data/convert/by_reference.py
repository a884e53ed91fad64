"""Take over a LeRobot dataset as it is: its metadata, a Contract, and links to its tables and videos, or copies.

For v3.0 and v3.1, and for any version in object storage, where the files stay: the result has their URL and the store's
tag of each. The result is a dataset of the same version. Of links its digests are those of the files that they lead to,
so that a source that changed or went away is noticed like a damaged copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.contract import Contract
from prts_core.data.convert.foreign import carried_contract, check_numbering, require_files, require_whole, splits_of
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.remote import REMOTE, metadata_of, write_remote
from prts_core.data.lerobot_v21.seal import SEAL, check_sizes, seal
from prts_core.data.lerobot_v21.select import Selection, select
from prts_core.data.lerobot_v21.tables import read_parquet
from prts_core.data.lerobot_v21.v30 import is_v30
from prts_core.data.lerobot_v21.writer import remove_strays, take_file
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import read_json, write_text
from prts_core.io.progress import track


def refer(
    place: Path | str,
    output: Path,
    *,
    dataset: str,
    source: LeRobotSource,
    robot: RobotConfig | None,
    digests: Mapping[str, str] | None = None,
) -> Contract:
    """Write `output`, a dataset whose tables and videos are those at `place`; `source.link` says how they get there.
    Of object storage they stay there: its URL, and the store's tag of every file, are written down. digests: SHA-256 in
    hexadecimal of the files of a folder, by their paths, so that what is linked is not read for it.

    Cameras may be left out and episodes held out: that is metadata. Raises ConfigError for a choice that needs tables
    written anew, DataError for a dataset that lacks files or whose tables are not numbered as its metadata says.
    """
    if isinstance(place, Path):
        check_sizes(place)
    opened = LeRobotDataset.open(place)
    root = opened.root
    selection = select(opened.info, source, root)
    _refuse_rewriting(place, opened, source, selection)
    require_whole(opened)
    info = selection.info(opened.info)
    contract = carried_contract(opened, info, dataset, robot)
    episodes = len(opened.lengths)
    splits = splits_of(info, episodes, episodes, source, dataset)
    files = dict.fromkeys(file for episode in opened.episodes() for file in info.episode_files(episode))
    _check_tables(opened)

    (output / SEAL).unlink(missing_ok=True)  # of an earlier run: what is not finished is not sealed
    (output / REMOTE).unlink(missing_ok=True)
    copied = source.link in ("copy", "hardlink")
    if opened.remote is None or copied:
        link = "symlink" if source.link == "auto" else "copy" if opened.remote else source.link
        for file in track(files, total=len(files), what=f"linking {dataset}"):
            take_file(opened.path(file), output / file, link)
        remove_strays(output, files)
        require_files(output, files)
    else:
        known = opened.remote.listing() | opened.remote.pinned  # of a result that refers: the files that it was made of
        write_remote(output, opened.remote.url, {file: known[file] for file in files})
    for file in metadata_of(root):
        take_file(root / file, output / file, "copy")
    described: dict[str, Any] = read_json(root / "meta" / "info.json")
    described |= {"splits": splits, "features": {key: described["features"][key] for key in info.features}}
    write_text(output / "meta/info.json", json.dumps(described, indent=4, ensure_ascii=False, allow_nan=False))
    contract.save(output / "meta" / "contract.json")
    seal(output, known={file: known for file, known in (digests or {}).items() if (output / file).is_symlink()})
    return contract


def _refuse_rewriting(place: Path | str, opened: LeRobotDataset, source: LeRobotSource, selection: Selection) -> None:
    field = "episodes" if source.episodes is not None else "select_state" if selection.joins else None
    if field is not None:
        url = None if opened.remote is None else opened.remote.url
        name = (url or str(place)).rpartition("/")[2]
        command = f"prts convert --source lerobot_v30 --from {name if url else place} --to {name}_v21"
        first = f"download the folder {url}, " if url else ""
        then = f"copy it into v2.1, `{command}`, and " if is_v30(opened.root) else ""
        raise ConfigError(
            "A dataset that is read where it lies keeps its episodes and columns",
            file=place,
            field=f"source.{field}",
            found=getattr(source, field) or ", ".join(selection.state),
            expected="every episode, and state and action as they are stored",
            cure=f"{first}{then}name that folder as root",
        )


def _check_tables(opened: LeRobotDataset) -> None:
    """Hold each table's counters against the metadata: a reader goes by these alone."""
    starts, keys = opened.starts, ["episode_index", "index"]
    for episode in track(opened.episodes(), total=len(starts), what="checking tables"):
        path = opened.path(opened.info.data_file(episode))
        check_numbering(opened.table(episode, keys), episode, starts[episode], path)
        part = opened.info.data_rows(episode)
        last = episode + 1 == len(starts) or opened.info.data_file(episode + 1) != opened.info.data_file(episode)
        if last and part is not None and len(read_parquet(path, ["index"], range(part.stop, part.stop + 1))):
            problem, cure = "A table does not hold what the metadata says", "restore the dataset from its source"
            found = f"more than {part.stop}"
            raise DataError(problem, file=path, field="rows", found=found, expected=part.stop, cure=cure)
