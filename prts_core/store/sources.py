"""List the external files that a stage reads: their paths, sizes and digests are part of every key below.

A dataset's own are listed by collect and convert; checkpoints, image-text data and simulators are what `Stage.reads`
names. `PRTS_SOURCES=recorded` takes the listing that was recorded instead of looking: for a machine that got its data
by `dvc pull`, or where looking at millions of files takes too long.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from prts_core.config.identity import identity
from prts_core.config.load import RunPlan, present_root, source_root, source_url
from prts_core.config.schema import CollectConfig
from prts_core.config.sources import LeRobotSource, RecordingSource
from prts_core.io.errors import ConfigError, DataError, StageError, UnavailableError
from prts_core.io.files import digest_bytes, digest_value, read_json, write_json
from prts_core.io.hub import checkpoint_revision, local_folder, split_hub_id
from prts_core.io.object_storage import RemoteFolder
from prts_core.store.listing import File, list_files, tree_digest, walk
from prts_core.store.manifest import MANIFEST, STORE
from prts_core.store.stage import Read, Stage
from prts_core.store.views import view_folder

SOURCES_VARIABLE = "PRTS_SOURCES"


def external_source(plan: RunPlan, dataset: str) -> LeRobotSource | RecordingSource | None:
    """The source of a dataset that was made elsewhere; none for one that is recorded here."""
    source = plan.datasets[dataset].source
    return source if isinstance(source, LeRobotSource | RecordingSource) else None


def listing(plan: RunPlan, dataset: str, outputs: Path, *, fetch: bool = False) -> list[File]:
    """The files of an external dataset. fetch: download one of the hub where it is not here yet.

    Raises Skipped for an optional dataset that is absent, UnavailableError for another one.
    """
    source = external_source(plan, dataset)
    assert source is not None, "recorded here: there is nothing to list"
    if isinstance(source, LeRobotSource) and source.root is None and not fetch and not source_root(source).exists():
        raise UnavailableError(
            f"Dataset {dataset!r} is not downloaded yet",
            field="source.repo_id",
            found=source.repo_id,
            cure=f"run `{plan.command('collect', dataset, outputs)}`",
        )
    return _list(dataset, source, outputs, plan.datasets[dataset].optional)


def _list(dataset: str, source: LeRobotSource | RecordingSource, outputs: Path, optional: bool = False) -> list[File]:
    """Of object storage: what the store says of each file, without reading any."""
    url = source_url(source)
    if url is not None:
        found = RemoteFolder(url).listing()
        return [
            File(name, one.size, 0, 0, digest_bytes(one.version.encode()).removeprefix("sha256:"))
            for name, one in found.items()
        ]
    root = present_root(dataset, source, optional)
    return list_files(root, cache_of(root, outputs))


def files_read(
    stage: Stage, plan: RunPlan, partition: str | None, outputs: Path, recorded: bool = False
) -> dict[str, str]:
    """What stands in a key for the files of `Stage.reads`: the digest of a listing, or the commit of a hub id. What is
    not on this machine is left out, and a hub id that is not downloaded stands for itself: the stage tells of them.

    recorded: what the recipe's view says instead, where there is one.
    """
    view = view_folder(outputs, plan.recipe.name, stage.name, partition) / MANIFEST
    if recorded and view.is_file() and "config" in (known := read_json(view)):  # not the note of a skip
        return dict(known["config"].get("files", {}))
    found = {}
    for name, read in stage.reads(plan, partition).items():
        if isinstance(read, str):
            found[name] = read
        elif not isinstance(read, Read):
            if told := read(outputs):
                found[name] = told
        elif (path := Path(read.source).expanduser()).exists():
            cache = cache_of(path, outputs, *read.names, read.pictures_of)
            found[name] = tree_digest(list_files(path, cache, read.names, _only(read, outputs)))
        elif (hub := split_hub_id(read.source)) is not None:
            commit = checkpoint_revision(read.source)
            found[name] = read.source if commit is None else f"{hub[0]}@{commit}"
    return found


def _only(read: Read, outputs: Path) -> list[str] | None:
    """The pictures that an image-text file names, parsed once for a file as it is; none where all files count."""
    path = Path(read.pictures_of)
    if not read.pictures_of or not path.is_file():
        return [] if read.pictures_of else None
    digest, kept = tree_digest(list_files(path, cache_of(path, outputs))), cache_of(path, outputs).with_suffix(".json")
    known = read_json(kept) if kept.is_file() else {}
    if known.get("digest") != digest:
        from prts_core.data.llava import image_names

        try:
            known = {"digest": digest, "pictures": image_names(path)}
        except (ConfigError, DataError):  # the stage that opens it tells what is wrong
            return []
        with contextlib.suppress(StageError):  # a full or read-only disk: parsed again next time
            write_json(kept, known)
    return list(known["pictures"])


def fetch_revisions(stage: Stage, plan: RunPlan, partition: str | None) -> None:
    """Download the small files of the hub's checkpoints that a stage reads and that are not here, so that its key can
    say which commit is meant. CheckpointError where they cannot be had."""
    for read in stage.reads(plan, partition).values() if looks() else ():
        hub = isinstance(read, Read) and not Path(read.source).expanduser().exists() and split_hub_id(read.source)
        if isinstance(read, Read) and hub and checkpoint_revision(read.source) is None:
            local_folder(read.source, ("*.json",))


def sources_stamp(stage: Stage, plan: RunPlan, dataset: str | None, outputs: Path) -> str:
    """Digest of the sizes, times and inodes of all external files that a stage reads: whether they are the very ones
    that work under way began to read. Empty where there is nothing to look at."""
    reads = [read for read in stage.reads(plan, dataset).values() if isinstance(read, Read)]
    roots = [(Path(read.source).expanduser(), read.names, _only(read, outputs)) for read in reads]
    source = external_source(plan, dataset or plan.recipe.deploy) if stage.external else None
    url = source_url(source) if source is not None else None
    if source is not None and url is None:
        roots.append((source_root(source), (), None))
    if not (roots or url) or not looks():
        return ""
    stored = [] if source is None or url is None else [file.row for file in _list("", source, outputs)]
    return digest_value(
        stored
        + [
            [path, info.st_size, info.st_mtime_ns, info.st_ino]
            for root, names, only in roots
            if root.exists()
            for path, info in walk(root, names, only)
        ]
    )


def cache_of(root: Path, outputs: Path, *of: str) -> Path:
    """Where the digests of a source's files are kept. of: which of them, where not all count."""
    name = digest_bytes("\n".join([str(root.absolute()), *filter(None, of)]).encode())[len("sha256:") :][:20]
    return outputs / STORE / ".sources" / f"{name}.tsv"


def looks() -> bool:
    """Whether external files are looked at, and not taken as they were recorded."""
    chosen = os.environ.get(SOURCES_VARIABLE, "look")
    if chosen not in ("look", "recorded"):
        raise ConfigError(
            "An environment variable has an unknown value",
            field=SOURCES_VARIABLE,
            found=chosen,
            expected="look or recorded",
            cure=f"unset {SOURCES_VARIABLE}",
        )
    return chosen == "look"


def sources_digest(plan: RunPlan, dataset: str | None, outputs: Path, *, fetch: bool = False) -> str:
    """What stands in a key for the external files of a dataset; empty where there are none."""
    name = dataset or plan.recipe.deploy
    if external_source(plan, name) is None:
        return ""
    return tree_digest(listing(plan, name, outputs, fetch=fetch)) if looks() else _recorded(plan, name, outputs)


def require_looked_at(
    stage: Stage, plan: RunPlan, dataset: str | None, sources: str, files: dict[str, str], outputs: Path
) -> None:
    """StageError where the files that a stage is about to read are not those whose listing is in its key: recorded
    listings find results, they never make one."""
    if looks():
        return
    name = dataset or plan.recipe.deploy
    changed = stage.external and external_source(plan, name) and tree_digest(listing(plan, name, outputs)) != sources
    if changed or files_read(stage, plan, dataset, outputs) != files:
        raise StageError(
            f"What stage {stage.name!r} reads is not what was recorded",
            field=SOURCES_VARIABLE,
            found="other files than those that were listed",
            cure=f"unset {SOURCES_VARIABLE}",
        )


def _recorded(plan: RunPlan, dataset: str, outputs: Path) -> str:
    """The listing that the recipe's view, or else the newest result of collect, has of this source."""
    wanted = dataset, _described(identity(plan.datasets[dataset].source))
    view = view_folder(outputs, plan.recipe.name, "collect", dataset) / MANIFEST
    stored = sorted((outputs / STORE / "collect").glob(f"*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    for path in [*([view] if view.is_file() else []), *stored]:
        known = read_json(path)
        if known.get("sources") and (known["partition"], _described(known["config"]["source"])) == wanted:
            return str(known["sources"])
    raise UnavailableError(
        f"No listing of dataset {dataset!r} was recorded",
        field=SOURCES_VARIABLE,
        found="recorded",
        expected="a result of collect in this store or the recipe's view",
        cure=f"run `dvc pull`, or where the source is: `{plan.command('collect', dataset, outputs)}`",
    )


def _described(source: dict[str, Any]) -> dict[str, Any]:
    """A source without its mapping, which does not change what collect lists."""
    return {name: value for name, value in source.items() if name != "mapping"}


def listed_rows(config: CollectConfig, outputs: Path) -> list[dict[str, Any]]:
    """[{path, size, sha256}] of the files of an external dataset, for collect's own output."""
    assert isinstance(config.source, LeRobotSource | RecordingSource)
    return [file.row for file in _list(config.dataset, config.source, outputs)]
