"""Say what an MLflow run is about: tags that lead back, a note with links, parameters, and inputs as datasets."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core import __version__
from prts_core.store.entries import flat
from prts_core.tracking.source import source_tags
from prts_core.tracking.store import ui_address

if TYPE_CHECKING:
    from prts_core.store.manifest import Manifest
    from prts_core.store.stage import Work

# MLflow's limits: characters of a parameter's value, of a tag's value, of a name, of a dataset's digest.
PARAM_CHARS, TAG_CHARS, NAME_CHARS, DIGEST_CHARS = 6000, 5000, 250, 36
PARENTS = "prts.parents"


def run_name(work: Work) -> str:
    return work.stage + (f":{work.partition}" if work.partition else "")


def work_tags(work: Work) -> dict[str, str]:
    """Everything that is known before the stage runs."""
    source = source_tags()
    parents = {role: {"key": m.key, "digest": m.digest} for role, m in work.inputs.items()}
    return {
        **source,
        **{key: str(value) for key, value in work.caller.items()},
        "prts.stage": work.stage,
        "prts.recipe": work.recipe,
        **({"prts.partition": work.partition} if work.partition else {}),
        "prts.key": work.key,
        "prts.version": str(work.version),
        "prts.program": __version__,
        "prts.config_file": work.config_file,
        "prts.config_digest": work.config_digest,
        "prts.overrides": changed_values(work) or "none",
        "prts.seed": "none" if work.seed is None else str(work.seed),
        **split_tag(PARENTS, json.dumps(parents, sort_keys=True, separators=(",", ":"))),
        "mlflow.runName": run_name(work),
        "mlflow.note.content": note(work),
        "mlflow.source.name": f"prts {work.stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": source["git.sha"],
        "mlflow.user": os.environ.get("USER", "prts"),
    }


def manifest_tags(manifest: Manifest) -> dict[str, str]:
    """What is known when the result is whole."""
    contracts = {f"prts.contract.{name}": fingerprint for name, fingerprint in manifest.contracts.items()}
    return {
        "prts.manifest_digest": manifest.digest,
        "prts.content_digest": manifest.content_digest,
        **({"prts.sources": manifest.sources} if manifest.sources else {}),
        **contracts,
    }


def changed_values(work: Work) -> str:
    """The `--set` options of the command, ready to be pasted."""
    return " ".join(f"--set {shlex.quote(text)}" for text in work.overrides)


def note(work: Work) -> str:
    """The run's description in Markdown, with a link to the page of the Dagster run that asked for it."""
    dataset = f", dataset `{work.partition}`" if work.partition else ""
    lines = [
        f"**{work.stage}** of recipe `{work.recipe}` (`{work.config_file}`){dataset}",
        f"Key `{work.key}`, behaviour version {work.version}. Changed values: `{changed_values(work) or 'none'}`",
    ]
    if run := work.caller.get("dagster.run_id"):
        asset = work.caller.get("dagster.asset_key")
        link = f"[Dagster run {run[:8]}]({ui_address('dagster', work.outputs)}/runs/{run})"
        lines.append(link + (f", asset `{asset}`" if asset else ""))
    return "\n\n".join(lines)


def split_tag(name: str, text: str) -> dict[str, str]:
    """A text of any length as tags `name`, `name.1`, `name.2`, ..."""
    pieces = [text[i : i + TAG_CHARS] for i in range(0, len(text), TAG_CHARS)] or [""]
    return {name + (f".{number}" if number else ""): piece for number, piece in enumerate(pieces)}


def join_tag(tags: Mapping[str, str], name: str) -> str:
    """The text that `split_tag` split; empty where there is none."""
    text, number = tags.get(name, ""), 1
    while (piece := tags.get(f"{name}.{number}")) is not None:
        text, number = text + piece, number + 1
    return text


def parents_of(tags: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Role -> (key, digest) of a run's parents. Runs from before there were keys have digests only."""
    raw = json.loads(join_tag(tags, PARENTS) or "{}")
    return {role: ("", p) if isinstance(p, str) else (p["key"], p["digest"]) for role, p in raw.items()}


def flatten(value: Any) -> dict[str, str]:
    """Nested plain data -> {"a.b.0.c": "text"}. Lists of plain values stay one JSON text; long texts are cut."""

    def shown(leaf: Any) -> str:
        text = leaf if isinstance(leaf, str) else json.dumps(leaf, ensure_ascii=False)
        return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"

    return {mlflow_name(name): shown(leaf) for name, leaf in flat(value).items()}


def mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and _-. :/ in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:NAME_CHARS]


def dataset_input(manifest: Manifest, role: str, folder: Path) -> Any:
    """One result as an MLflow dataset input: digest cut to MLflow's 36 characters, the whole of it in a tag."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = manifest.content_digest.removeprefix("sha256:")[:DIGEST_CHARS]
    # What a MetaDataset over a local source becomes when MLflow stores it; nothing is loaded.
    entity = Dataset(manifest.name, digest, source_type="local", source=json.dumps({"uri": str(folder.resolve())}))
    tags = {
        "mlflow.data.context": role,
        "prts.content_digest": manifest.content_digest,
        "prts.manifest_digest": manifest.digest,
        "prts.key": manifest.key,
    }
    return DatasetInput(entity, tags=[InputTag(key, value) for key, value in tags.items()])
