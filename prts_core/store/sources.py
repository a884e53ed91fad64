"""List the external files that a dataset comes from: their paths, sizes and digests are part of every key below.

`PRTS_SOURCES=recorded` takes the listing that collect recorded instead of looking at the source: for a machine that got
its data by `dvc pull`, or where looking at millions of files takes too long.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prts_core.config.identity import identity
from prts_core.config.load import Plan, present_root, source_root
from prts_core.config.schema import CollectConfig, LeRobotSource, RecordingSource
from prts_core.errors import ConfigError, StageError, UnavailableError
from prts_core.files import digest_bytes, digest_value, read_json
from prts_core.store.listing import File, list_files, tree_digest, walk
from prts_core.store.manifest import MANIFEST, STORE
from prts_core.store.views import view_folder

SOURCES_VARIABLE = "PRTS_SOURCES"


def external_source(plan: Plan, dataset: str) -> LeRobotSource | RecordingSource | None:
    """The source of a dataset that was made elsewhere; none for one that is recorded here."""
    source = plan.datasets[dataset].source
    return source if isinstance(source, LeRobotSource | RecordingSource) else None


def listing(plan: Plan, dataset: str, outputs: Path, *, fetch: bool = False) -> list[File]:
    """The files of an external dataset. fetch: download one of the hub where it is not here yet.

    Raises Skipped for an optional dataset that is absent, UnavailableError for another one.
    """
    source = external_source(plan, dataset)
    assert source is not None, "recorded here: there is nothing to list"
    if isinstance(source, LeRobotSource) and source.root is None and not fetch and not source_root(source).exists():
        raise UnavailableError(
            f"Dataset {dataset!r} is not downloaded yet", field="source.repo_id", found=source.repo_id,
            cure=f"run `{plan.command('collect', dataset, outputs)}`",
        )  # fmt: skip
    root = present_root(dataset, source, plan.datasets[dataset].optional)
    return list_files(root, cache_of(root, outputs))


def sources_stamp(plan: Plan, dataset: str | None, outputs: Path) -> str:
    """Digest of the sizes, times and inodes of an external dataset's files: whether they are the very ones that work
    under way began to read. Empty where there is nothing to look at."""
    name = dataset or plan.recipe.deploy
    source = external_source(plan, name)
    if source is None or os.environ.get(SOURCES_VARIABLE, "look") == "recorded":
        return ""
    root = source_root(source)
    return digest_value([[path, info.st_size, info.st_mtime_ns, info.st_ino] for path, info in walk(root)])


def cache_of(root: Path, outputs: Path) -> Path:
    """Where the digests of a source's files are kept."""
    name = digest_bytes(str(root.absolute()).encode())[len("sha256:") :][:20]
    return outputs / STORE / ".sources" / f"{name}.tsv"


def sources_digest(plan: Plan, dataset: str | None, outputs: Path, *, fetch: bool = False) -> str:
    """What stands in a key for the external files of a dataset; empty where there are none."""
    name = dataset or plan.recipe.deploy
    if external_source(plan, name) is None:
        return ""
    chosen = os.environ.get(SOURCES_VARIABLE, "look")
    if chosen not in ("look", "recorded"):
        raise ConfigError(
            "An environment variable has an unknown value", field=SOURCES_VARIABLE, found=chosen,
            expected="look or recorded", cure=f"unset {SOURCES_VARIABLE}",
        )  # fmt: skip
    if chosen == "recorded":
        return _recorded(plan, name, outputs)
    return tree_digest(listing(plan, name, outputs, fetch=fetch))


def require_looked_at(plan: Plan, dataset: str | None, digest: str, outputs: Path) -> None:
    """StageError where the source that a stage is about to read is not the one whose listing is in its key: recorded
    listings find results, they never make one."""
    name = dataset or plan.recipe.deploy
    if os.environ.get(SOURCES_VARIABLE, "look") == "look" or external_source(plan, name) is None:
        return
    if tree_digest(listing(plan, name, outputs)) != digest:
        raise StageError(
            f"The source of dataset {name!r} is not the one that was recorded", field=SOURCES_VARIABLE,
            found="other files than those that collect listed", cure=f"unset {SOURCES_VARIABLE}",
        )  # fmt: skip


def _recorded(plan: Plan, dataset: str, outputs: Path) -> str:
    """The listing that the recipe's view, or else the newest result of collect, has of this source."""
    wanted = dataset, _described(identity(plan.datasets[dataset].source))
    view = view_folder(outputs, plan.recipe.name, "collect", dataset) / MANIFEST
    stored = sorted((outputs / STORE / "collect").glob(f"*/{MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    for path in [*([view] if view.is_file() else []), *stored]:
        known = read_json(path)
        if known.get("sources") and (known["partition"], _described(known["config"]["source"])) == wanted:
            return str(known["sources"])
    raise UnavailableError(
        f"No listing of dataset {dataset!r} was recorded", field=SOURCES_VARIABLE, found="recorded",
        expected="a result of collect in this store or the recipe's view",
        cure=f"run `dvc pull`, or where the source is: `{plan.command('collect', dataset, outputs)}`",
    )  # fmt: skip


def _described(source: dict[str, Any]) -> dict[str, Any]:
    """A source without its mapping, which does not change what collect lists."""
    return {name: value for name, value in source.items() if name != "mapping"}


def listed_rows(config: CollectConfig, outputs: Path) -> list[dict[str, Any]]:
    """[{path, size, sha256}] of the files of an external dataset, for collect's own output."""
    assert isinstance(config.source, LeRobotSource | RecordingSource)
    root = present_root(config.dataset, config.source)
    return [file.row for file in list_files(root, cache_of(root, outputs))]
