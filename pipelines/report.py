"""`outputs/demo/report.json`: the figures of the whole chain in one file, and as a table. Computes none itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prts_core.config.load import Plan
from prts_core.files import read_json, write_json
from prts_core.manifest import Manifest
from prts_core.stages import chain
from prts_core.stages.base import load_manifest, load_provenance

RATES = (
    "success_rate",
    "untrained_success_rate",
    "blind_replay_success_rate",
    "swapped_success_rate",
    "black_image_success_rate",
)
SUBTASK = ("exact_match", "baseline_commonest")
VALUES = ("spearman", "right_over_wrong", "auroc", "n_failed", "n_success")


def write(plan: Plan, outputs: Path) -> Path:
    """Gather the finished stages' reports into `<outputs>/demo/report.json`."""
    manifests = {(s, p): load_manifest(outputs, s, plan.recipe.name, p) for s, p in chain.steps(plan)}
    benchmark = _json(manifests["benchmark", None], "report.json", outputs)
    value = _json(manifests["value", None], "report.json", outputs)
    said = _json(manifests["subtask", None], "report.json", outputs)["heldout"] or {}
    package = manifests["package", None]
    registered = _json(manifests["register", None], "registration.json", outputs)
    seconds: dict[str, float] = {}
    for (stage, _), manifest in manifests.items():
        spent = 0.0 if manifest.skipped else float(load_provenance(outputs, manifest).get("seconds", 0.0))
        seconds[stage] = round(seconds.get(stage, 0.0) + spent, 3)
    gathered = {
        "recipe": plan.recipe.name,
        "suite": benchmark["suite"],
        "labels": benchmark["labels"],
        **{name: benchmark[name] for name in RATES},
        "tasks": benchmark["tasks"],
        "value": {name: value[name] for name in VALUES},
        "subtask": {name: said.get(name) for name in SUBTASK},
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 3),
        "model_uri": registered["model_uri"],
        "aliases": registered["aliases"],
        "verdict": registered["verdict"]["reason"],
        "package_digest": package.content_digest,
        "policy_digest": benchmark["policy_digest"],
        "dataset_digests": {name: manifests["convert", name].content_digest for name in plan.datasets},
        "skipped": {f"{s}:{p}" if p else s: m.skipped for (s, p), m in manifests.items() if m.skipped},
    }
    path = outputs / "demo" / "report.json"
    if not path.exists() or read_json(path) != gathered:
        write_json(path, gathered)
    return path


def _json(manifest: Manifest, name: str, outputs: Path) -> Any:
    return read_json(manifest.folder(outputs) / name)


def show(path: Path, console: Console) -> None:
    """Print the report as tables."""
    report = read_json(path)
    tasks = Table(title="; ".join([f"closed loop on {report['suite']}", *report["labels"]]), title_justify="left")
    for column in ("task", "success", "expert", "blind replay", "step limit"):
        tasks.add_column(column, justify="left" if column == "task" else "right")
    for name, row in sorted(report["tasks"].items()):
        rates = [_number(row.get(rate)) for rate in ("expert", "blind_replay")]
        tasks.add_row(name, f"{row['successes']}/{row['n']}", *rates, str(row.get("max_steps", "")))
    console.print(tasks)
    figures = Table(title="figures", title_justify="left", show_header=False)
    figures.add_column()
    figures.add_column(justify="right", overflow="fold")
    for name in RATES:
        figures.add_row(name.replace("_", " "), _number(report[name]))
    for name, figure in report["value"].items():
        figures.add_row(f"value: {name.replace('_', ' ')}", _number(figure))
    for name, figure in report["subtask"].items():
        figures.add_row(f"subtask: {name.replace('_', ' ')}", _number(figure))
    figures.add_section()
    for stage in chain.STAGES:
        figures.add_row(f"{stage} [s]", f"{report['seconds'][stage]:.1f}")
    figures.add_row("all stages [s]", f"{report['seconds_total']:.1f}")
    figures.add_section()
    figures.add_row("model", f"{report['model_uri']} {' '.join('@' + alias for alias in report['aliases'])}")
    figures.add_row("gate", report["verdict"])
    figures.add_row("package", report["package_digest"])
    for name, digest in report["dataset_digests"].items():
        figures.add_row(f"dataset {name}", digest)
    console.print(figures)
    for what, reason in report["skipped"].items():
        console.print(f"skipped {what}: {reason}", highlight=False, markup=False)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
