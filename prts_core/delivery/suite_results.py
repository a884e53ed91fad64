"""What a registered version achieved on each suite: one tag a suite on the version, the episodes in an MLflow run.

It compares nothing and promotes nobody; the gate and prts_core.delivery.promotion do.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.config.schema import OWN_BENCHMARK
from prts_core.delivery import registry
from prts_core.delivery.gate import policy_episodes
from prts_core.io.errors import DataError, StageError
from prts_core.io.files import canonical_json
from prts_core.statistics.binomial import Interval, wilson
from prts_core.tracking.source import source_tags
from prts_core.tracking.store import client, experiment_id, local_path, mlflow_module, run_url, tracking_uri

if TYPE_CHECKING:
    import polars as pl
    from mlflow.entities.model_registry import ModelVersion

TAG, AGAIN = "prts.suite.", "prts.again."
EPISODES, REPORT = "episodes.parquet", "report.json"


@dataclass(frozen=True)
class SuiteResult:
    """Successes among n episodes of one suite. suite: its own name, the result may have another.

    protocol_digest: two results are compared only where it is the same; of the recipe's own benchmark it is empty, and
    the episodes alone must be the same. standins: what the suite's assets were replaced by; empty for the real ones.
    run_id: the MLflow run that holds the episodes. alarm, reason: the gate's word at the time. attempt: which night's.
    """

    suite: str
    successes: int
    n: int
    protocol_digest: str = ""
    standins: str = ""
    run_id: str = ""
    alarm: bool = False
    reason: str = ""
    attempt: str = ""

    @property
    def rate(self) -> Interval:
        return wilson(self.successes, self.n)

    def said(self) -> str:
        """For people: rate, interval, label."""
        rate = self.rate
        text = f"{rate.estimate:.3f} [{rate.lower:.3f}, {rate.upper:.3f}], {self.successes}/{self.n}"
        return text + (" (stand-in assets)" if self.standins else "")


def results_of(version: ModelVersion, tag: str = TAG) -> dict[str, SuiteResult]:
    """Name -> result, as the version's tags say. tag: TAG for the recorded ones, AGAIN for the last repetition's.

    Raises DataError for a tag that somebody else wrote.
    """
    found = {}
    for key, text in sorted(version.tags.items()):
        if key.startswith(tag):
            try:
                found[key[len(tag) :]] = SuiteResult(**json.loads(text))
            except (ValueError, TypeError) as err:
                raise DataError(
                    f"A result on version {version.version} of {version.name!r} cannot be read", field=key,
                    found=f"{type(err).__name__}: {err}", cure="delete the tag; the suite is then run again",
                ) from err  # fmt: skip
    return found


def write_result(outputs: Path, version: ModelVersion, name: str, result: SuiteResult, tag: str = TAG) -> None:
    """Put the result on the version: one tag for programs, one for people."""
    store = client(outputs)
    store.set_model_version_tag(version.name, version.version, tag + name, canonical_json(asdict(result)))
    if tag == TAG:
        store.set_model_version_tag(version.name, version.version, f"prts.success_rate.{name}", result.said())


def episodes_of(outputs: Path, version: ModelVersion, name: str, result: SuiteResult) -> pl.DataFrame:
    """The episodes that a recorded result counts (task, initial_state, seed, success)."""
    if name == OWN_BENCHMARK:
        return policy_episodes(registry.version_files(outputs, version, registry.EPISODES))
    mlflow, store = mlflow_module(), client(outputs)
    try:
        folder = local_path(store.get_run(result.run_id).info.artifact_uri)
        if folder is not None:
            return policy_episodes(folder / EPISODES)
        with tempfile.TemporaryDirectory() as target:
            return policy_episodes(Path(store.download_artifacts(result.run_id, EPISODES, target)))
    except mlflow.exceptions.MlflowException as err:
        raise StageError(
            f"The episodes of version {version.version} on {name!r} are gone from MLflow", field=result.run_id,
            found=" ".join(str(err).split())[:200],
            cure=f"delete the version's tag {TAG}{name}; the suite is then run again",
        ) from err  # fmt: skip


class SuiteRunLog:
    """The MLflow run of one suite on one version; `with` ends it, as failed where an error goes through."""

    def __init__(
        self, outputs: Path, recipe: str, version: ModelVersion, name: str, attempt: str, caller: dict[str, str]
    ) -> None:
        self.store, self.version, self.name = client(outputs), version, name
        experiment, uri = experiment_id(outputs, recipe), tracking_uri(outputs)
        tags = {
            "prts.stage": "regression", "prts.recipe": recipe, "prts.suite": name, "prts.attempt": attempt,
            "prts.model": f"models:/{version.name}/{version.version}", **source_tags(), **caller,
        }  # fmt: skip
        run_name = f"regression {name} v{version.version}"
        self.run_id = self.store.create_run(experiment, run_name=run_name, tags=tags).info.run_id
        self.url = run_url(uri, experiment, self.run_id)

    def __enter__(self) -> SuiteRunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.store.set_terminated(self.run_id, "FINISHED" if kind is None else "FAILED")

    def keep(self, result: SuiteResult, folder: Path, recorded: bool) -> None:
        """Metrics, labels and files. recorded: the version's own result, which its logged model shows too."""
        rate = result.rate
        figures: dict[str, Any] = {
            "success_rate": rate.estimate, "success_lower": rate.lower, "success_upper": rate.upper,
            "episodes": result.n, "alarm": result.alarm,
        }  # fmt: skip
        for key, value in figures.items():
            self.store.log_metric(self.run_id, key, float(value))
        model = self.version.tags.get("prts.model_id")
        if recorded and model:
            self.store.log_metric(self.run_id, f"success_rate/{self.name}", rate.estimate, model_id=model)
        for key in ("protocol_digest", "standins", "reason"):
            self.store.set_tag(self.run_id, f"prts.{key}", getattr(result, key) or "none")
        for file in (EPISODES, REPORT, "page.html"):
            if (folder / file).is_file():
                self.add(folder / file)

    def add(self, file: Path) -> None:
        self.store.log_artifact(self.run_id, str(file))
