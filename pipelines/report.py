"""`outputs/demo/report.json`: the figures of the whole chain in one file, and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prts_core.config.load import RunPlan
from prts_core.io.errors import Skipped, StageError, UnavailableError
from prts_core.io.files import read_json, write_json
from prts_core.stages import chain, declarations
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import Resolved, load_provenance

RATES = (
    "success_rate",
    "untrained_success_rate",
    "blind_replay_success_rate",
    "swapped_success_rate",
    "black_image_success_rate",
)
SUBTASK = ("exact_match", "baseline_commonest")
VALUES = ("spearman", "right_over_wrong", "auroc", "n_failed", "n_success")


Results = dict[tuple[str, str | None], Manifest | Skipped | None]


def results(plan: RunPlan, outputs: Path) -> Results:
    """(stage, dataset) -> its verified result under this plan, why it is skipped, or none where it has not run."""
    store = chain.store(outputs)
    known: dict[tuple[str, str | None], Resolved] = {}
    found: Results = {}
    for stage, partition in declarations.steps(plan):
        try:
            found[stage, partition] = store.find(store.resolve(stage, plan, partition, known=known), plan)
        except Skipped as err:
            found[stage, partition] = err
        except UnavailableError:  # a dataset of the hub that is not downloaded yet
            found[stage, partition] = None
    return found


def registration(plan: RunPlan, outputs: Path) -> Path | None:
    """What `register` wrote for this recipe, or none."""
    path = outputs / "registrations" / f"{plan.recipe.name}.json"
    return path if path.is_file() else None


def write(plan: RunPlan, outputs: Path) -> Path:
    """Gather the finished stages' reports into `<outputs>/demo/report.json`. StageError where something has not run."""
    found = results(plan, outputs)
    missing = [(stage, partition) for (stage, partition), result in found.items() if result is None]
    registered = registration(plan, outputs)
    if missing or registered is None:
        stage, partition = (missing or [("register", None)])[0]
        raise StageError(
            f"Stage {stage!r} has not run yet under this plan",
            found="no result",
            cure=f"run `{plan.command(stage, partition, outputs)}`, or `make demo` again",
        )
    manifests = {step: result for step, result in found.items() if isinstance(result, Manifest)}
    skipped = {f"{s}:{p}" if p else s: str(result) for (s, p), result in found.items() if isinstance(result, Skipped)}
    benchmark = _json(manifests["benchmark", None], outputs)
    value = _json(manifests["value", None], outputs)
    taught = manifests.get(("subtask", None))
    said = {} if taught is None else _json(taught, outputs)["heldout"] or {}
    model = read_json(registered)
    seconds = dict.fromkeys((stage for stage, _ in found), 0.0)
    for (stage, _), manifest in manifests.items():
        seconds[stage] += float(load_provenance(outputs, manifest).get("seconds", 0.0))
    gathered = {
        "recipe": plan.recipe.name,
        "suite": benchmark["suite"],
        "labels": benchmark["labels"],
        **{name: benchmark[name] for name in RATES},
        "tasks": benchmark["tasks"],
        "value": {name: value[name] for name in VALUES},
        "subtask": {name: said.get(name) for name in SUBTASK},
        "seconds": {stage: round(spent, 3) for stage, spent in sorted(seconds.items())},
        "seconds_total": round(sum(seconds.values()), 3),
        "model_uri": model["model_uri"],
        "aliases": model["aliases"],
        "verdict": model["verdict"]["reason"],
        "package_digest": model["package_digest"],
        "policy_digest": benchmark["policy_digest"],
        "dataset_digests": {p: m.content_digest for (s, p), m in manifests.items() if s == "convert"},
        "skipped": skipped,
    }
    path = outputs / "demo" / "report.json"
    if not path.exists() or read_json(path) != gathered:
        write_json(path, gathered)
    return path


def _json(manifest: Manifest, outputs: Path) -> Any:
    return read_json(manifest.folder(outputs) / "report.json")


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
    for stage in declarations.STAGES:
        if stage in report["seconds"]:
            figures.add_row(f"{stage}, seconds", f"{report['seconds'][stage]:.1f}")
    figures.add_row("all stages, seconds", f"{report['seconds_total']:.1f}")
    figures.add_section()
    figures.add_row("model", f"{report['model_uri']} {' '.join('@' + alias for alias in report['aliases'])}")
    figures.add_row("gate", report["verdict"])
    figures.add_row("package", report["package_digest"])
    for name, digest in report["dataset_digests"].items():
        figures.add_row(f"dataset {name}", digest)
    console.print(figures)
    for what, reason in report["skipped"].items():
        console.print(f"skipped {what}: {reason}", style="yellow", highlight=False, markup=False)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
