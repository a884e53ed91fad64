"""Show a stage's result on its page: version, figures, plot, tables, and the links that lead on."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from prts_core.config.load import RunPlan
from prts_core.io.errors import PrtsError
from prts_core.store.code import code_digest
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import load_provenance
from prts_core.tracking.store import run_url

PICTURE_WIDTH = 640  # pixels; pictures stand inside Dagster's event log as text
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Check:
    """A check of a stage's asset. blocking: nothing that follows runs when it fails."""

    name: str
    description: str
    blocking: bool = False


@dataclass(frozen=True)
class Shown:
    """What one stage's page has beside the usual.

    results(output, plan): the checks' results. extra(output): more metadata. failed(error): the checks' results where
    the stage itself refused; none where that is simply a fault.
    """

    checks: tuple[Check, ...] = ()
    results: Callable[[Path, RunPlan], list[dg.AssetCheckResult]] = lambda output, plan: []
    extra: Callable[[Path], dict[str, Any]] = lambda output: {}
    failed: Callable[[PrtsError], list[dg.AssetCheckResult]] = lambda error: []


def metadata(manifest: Manifest, outputs: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What every stage's page shows. Pictures are inline; times and links come from provenance.json."""
    provenance = load_provenance(outputs, manifest)
    folder, links = manifest.folder(outputs), provenance.get("mlflow", {})
    shown: dict[str, Any] = {}
    picture = next((folder / a for a in provenance.get("artifacts", []) if a.lower().endswith(PICTURES)), None)
    if picture is not None and picture.is_file():
        shown["plot"] = dg.MetadataValue.md(inline_picture(picture))
    if run := links.get("run_id"):  # at MLflow's address of now: the recorded one is that of the day it was made
        shown["mlflow_run"] = dg.MetadataValue.url(run_url(links["tracking_uri"], links["experiment_id"], run, outputs))
    if overrides:
        shown["changed values"] = "; ".join(overrides) + " (the recipe's own result stays as it was)"
    if made_by_other_code(manifest, provenance):
        shown["made by other code"] = "its source has changed since; nothing runs again before its version is raised"
    shown |= {name: float(value) for name, value in manifest.metrics.items()}
    shown |= {
        "seconds": float(provenance.get("seconds", 0.0)),
        "bytes": int(provenance.get("bytes", 0)),
        "path": dg.MetadataValue.path(str(folder.resolve())),
        "key": manifest.key,
        "content_digest": manifest.content_digest,
        "manifest_digest": manifest.digest,
        **{f"contract/{name}": value for name, value in manifest.contracts.items()},
    }
    timing = provenance.get("timing", {})
    if "samples_per_s" in timing:  # of a stage that trains
        rows = [(k, f"{v:.4g}" if isinstance(v, float) else ", ".join(v) or "none") for k, v in timing.items()]
        shown["training"] = table(("of a step", "value"), rows)
    for name, value in links.items():  # run_id, fault, git.sha, dvc.rev, ...
        if value not in ("", "none") and name not in ("url", "tracking_uri", "experiment_id"):
            shown[name if name.startswith(("git.", "dvc.")) else f"mlflow_{name}"] = str(value)
    return shown


def made_by_other_code(manifest: Manifest, provenance: dict[str, Any]) -> bool:
    known = provenance.get("code")
    return bool(known) and known != code_digest(manifest.kind)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dg.TableMetadataValue:
    """Rows as a table; what is neither text nor number is written out."""
    kinds = [_column_type([row[at] for row in rows]) for at in range(len(header))]
    records = [
        dg.TableRecord({name: _cell(value, kind) for name, kind, value in zip(header, kinds, row, strict=True)})
        for row in rows
    ]
    columns = [dg.TableColumn(name, kind) for name, kind in zip(header, kinds, strict=True)]
    return dg.MetadataValue.table(records, dg.TableSchema(columns))


def _column_type(values: list[Any]) -> str:
    present = [value for value in values if value is not None]
    for kind, name in ((bool, "bool"), (int, "int"), (float, "float")):
        if present and all(type(value) is kind for value in present):
            return name
    return "string"


def _cell(value: Any, kind: str) -> Any:
    if kind == "string":
        return "" if value is None else str(value)
    return value


def inline_picture(path: Path, width: int = PICTURE_WIDTH) -> str:
    """A picture as one line of Markdown that needs no file server."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((width, 4 * width))
    candidates: list[tuple[str, bytes]] = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80, "optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        candidates.append((kind, buffer.getvalue()))
    kind, smallest = min(candidates, key=lambda candidate: len(candidate[1]))
    return f"![{path.stem}](data:image/{kind};base64,{base64.b64encode(smallest).decode()})"
