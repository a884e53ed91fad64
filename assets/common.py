"""From a stage's manifest to what Dagster shows: data version, metrics, plot, link to the MLflow run, reason of a skip.

The one place where stages and Dagster touch; it does not know what any stage computes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import TypeAdapter

from assets.partitions import DATASETS, DEPLOY, PLAN
from assets.resources import DvcResource, PlanResource
from prts_core import __version__
from prts_core.errors import PrtsError
from prts_core.files import digest_value
from prts_core.manifest import Manifest
from prts_core.stages import chain
from prts_core.stages.base import load_provenance

PICTURE_WIDTH = 640  # pixels; pictures stand inside Dagster's event log as text
PICTURES = (".png", ".jpg", ".jpeg")


@cache
def code_version(stage: str) -> str:
    """Changes when PRTS or the fields of the stage's configuration change."""
    declared = chain.STAGES[stage]
    kind = type(declared.config(PLAN, DEPLOY if declared.partitioned else None))
    return f"{__version__}-{digest_value(TypeAdapter(kind).json_schema())[len('sha256:') :][:8]}"


def declare(stage: str, *, group: str, team: str, kinds: set[str], deps: list[Any]) -> dict[str, Any]:
    """The arguments of `@dg.asset` that all stages spell alike."""
    declared = chain.STAGES[stage]
    return {
        "name": stage,
        "description": declared.help[0].upper() + declared.help[1:] + ".",
        "group_name": group,
        "owners": [f"team:{team}"],
        "kinds": kinds,
        "tags": {"prts/stage": stage},
        "code_version": code_version(stage),
        "partitions_def": DATASETS if declared.partitioned else None,
        "deps": deps,
        "output_required": False,  # a skipped stage materialises nothing and says why
    }


def run_stage_of(context: dg.AssetExecutionContext, plan: PlanResource) -> Manifest:
    """Call the asset's stage for its partition, with the tags that lead back from MLflow to this Dagster run."""
    stage = context.asset_key.to_user_string()
    partition = context.partition_key if context.assets_def.partitions_def else None
    tags = {
        "dagster.run_id": context.run.run_id,
        "dagster.job": context.job_name,
        "dagster.asset_key": stage,
        "dagster.code_version": code_version(stage),
    }
    if partition:
        tags["dagster.partition"] = partition
    return chain.run(stage, plan.load(), partition, plan.folder, caller=tags)


def failure(err: PrtsError) -> dg.Failure:
    """The error's paragraph as the failure's text; trying again would not help."""
    shown = {
        name: str(value) for name in ("file", "field", "found", "expected", "cure") if (value := getattr(err, name))
    }
    return dg.Failure(description=str(err), metadata=shown, allow_retries=False)


def materialize(
    context: dg.AssetExecutionContext,
    plan: PlanResource,
    dvc: DvcResource,
    extra: Callable[[Path], dict[str, Any]] = lambda output: {},
) -> Iterator[Any]:
    """The body of an asset without checks: run the stage, enter it into DVC, show it with `extra` metadata."""
    try:
        manifest = run_stage_of(context, plan)
        yield from finish(context, manifest, plan, dvc, extra=extra)
    except PrtsError as err:
        raise failure(err) from err


def finish(
    context: dg.AssetExecutionContext,
    manifest: Manifest,
    plan: PlanResource,
    dvc: DvcResource,
    checks: list[dg.AssetCheckResult] | None = None,
    extra: Callable[[Path], dict[str, Any]] = lambda output: {},
) -> Iterator[Any]:
    """Yield the materialisation of a stage that is done; for a skipped one, say why and pass the reason on."""
    context.log.info("DVC: %s", dvc.commit(manifest, plan.folder))
    if manifest.skipped:
        context.log.warning("%s is skipped: %s", manifest.kind, manifest.skipped)
        _pass_on_skip(context, manifest, plan, dvc)
        yield from checks or []
        return
    yield dg.MaterializeResult(
        data_version=dg.DataVersion(manifest.digest),
        metadata=metadata(manifest, plan.folder) | extra(manifest.folder(plan.folder)),
        check_results=checks or [],
    )


def _pass_on_skip(context: dg.AssetExecutionContext, skipped: Manifest, plan: PlanResource, dvc: DvcResource) -> None:
    """Dagster never runs what follows a skipped asset, `dvc repro` would: give them their manifests too."""
    loaded = plan.load()
    later = [s for s, p in chain.steps(loaded) if p == skipped.partition and skipped.partition]
    for stage in later[later.index(skipped.kind) + 1 :] if skipped.kind in later else []:
        try:
            manifest = chain.run(stage, loaded, skipped.partition, plan.folder)
        except PrtsError as err:  # a parent outside this partition is missing yet; its own run will say so
            context.log.info("%s is left as it is: %s", stage, err)
            return
        dvc.commit(manifest, plan.folder)


def metadata(manifest: Manifest, outputs: Path) -> dict[str, Any]:
    """What the asset's page shows. Pictures are inline; times and links come from provenance.json."""
    provenance = load_provenance(outputs, manifest)
    folder, links = manifest.folder(outputs), provenance.get("mlflow", {})
    shown: dict[str, Any] = {}
    picture = next((folder / a for a in provenance.get("artifacts", []) if a.lower().endswith(PICTURES)), None)
    if picture is not None and picture.is_file():
        shown["plot"] = dg.MetadataValue.md(inline_picture(picture))
    if url := links.get("url"):
        shown["mlflow_run"] = dg.MetadataValue.url(url)
    shown |= {name: float(value) for name, value in manifest.metrics.items()}
    shown |= {
        "seconds": float(provenance.get("seconds", 0.0)),
        "content": dg.MetadataValue.path(str(folder)),
        "content_digest": manifest.content_digest,
        "manifest_digest": manifest.digest,
        **{f"contract/{name}": value for name, value in manifest.contracts.items()},
    }
    for name, value in links.items():  # run_id, fault, git.sha, dvc.rev, ...
        if value and name not in ("url", "tracking_uri", "experiment_id"):
            shown[name if name.startswith(("git.", "dvc.")) else f"mlflow_{name}"] = str(value)
    return shown


def inline_picture(path: Path, width: int = PICTURE_WIDTH) -> str:
    """A picture as one line of Markdown that needs no file server."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((width, 4 * width))
    best: tuple[str, bytes] | None = None
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80, "optimize": True})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if best is None or len(buffer.getvalue()) < len(best[1]):
            best = (kind, buffer.getvalue())
    assert best is not None
    return f"![{path.stem}](data:image/{best[0]};base64,{base64.b64encode(best[1]).decode()})"


def markdown_table(header: list[str], rows: list[list[Any]]) -> str:
    """Rows as a Markdown table; a bar inside a cell is escaped."""

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)])
