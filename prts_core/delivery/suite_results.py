"""Keep what a registered version achieved on each suite: one tag a suite on the version, the episodes in an MLflow run
(those of the registration beside the package)."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prts_core.delivery import registry
from prts_core.delivery.gate import policy_episodes
from prts_core.io.errors import DataError, StageError
from prts_core.io.files import canonical_json, digest_value
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

    protocol_digest: of every setting that can move the rate; two results are compared only where it is the same.
    episodes_digest: of task, initial state, seed and outcome of each. standins: what the suite's assets were
    replaced by; empty for the real ones. dtype: what the policy computed in; compared like the protocol. run_id:
    the MLflow run that holds the episodes; empty: they lie with the package. alarm: the gate's at the time.
    attempt: which night's.
    """

    suite: str
    successes: int
    n: int
    protocol_digest: str = ""
    episodes_digest: str = ""
    standins: str = ""
    dtype: Literal["bf16", "fp32"] = "fp32"
    run_id: str = ""
    alarm: bool = False
    attempt: str = ""

    @property
    def rate(self) -> Interval:
        return wilson(self.successes, self.n)

    def said(self) -> str:
        """For people: rate, interval, label."""
        rate = self.rate
        text = f"{rate.estimate:.3f} [{rate.lower:.3f}, {rate.upper:.3f}], {self.successes}/{self.n}"
        return text + (" (stand-in assets)" if self.standins else "") + (" (bf16)" if self.dtype == "bf16" else "")

    @property
    def digest(self) -> str:
        return digest_value([self.suite, self.protocol_digest, self.episodes_digest])


def result_of(report: dict[str, Any], episodes: pl.DataFrame) -> SuiteResult:
    """A benchmark's report.json, and the policy's own episodes, as a result."""
    return SuiteResult(
        suite=report["suite"],
        successes=int(episodes["success"].sum()),
        n=episodes.height,
        protocol_digest=report["protocol_digest"],
        episodes_digest=digest_of(episodes),
        standins="; ".join(report["labels"]),
        dtype=computed_in(report),
    )


def computed_in(report: dict[str, Any]) -> Literal["bf16", "fp32"]:
    """What the policy of a report computed in: fp32 where the report is older than the choice."""
    return "bf16" if report.get("dtype") == "bf16" else "fp32"


def digest_of(episodes: pl.DataFrame) -> str:
    return digest_value([list(row) for row in episodes.iter_rows()])


def results_of(version: ModelVersion, tag: str = TAG) -> dict[str, SuiteResult]:
    """Name -> result, as the version's tags say. tag: TAG for the recorded ones, AGAIN for the last repetition's.

    Raises DataError for a tag that somebody else wrote.
    """
    found = {}
    for key, text in sorted(version.tags.items()):
        if key.startswith(tag):
            try:
                raw = json.loads(text)
                known = {name: raw[name] for name in SuiteResult.__dataclass_fields__ if name in raw}
                found[key[len(tag) :]] = SuiteResult(**known)
            except (ValueError, TypeError) as err:
                raise DataError(
                    f"A result on version {version.version} of {version.name!r} cannot be read",
                    field=key,
                    found=f"{type(err).__name__}: {err}",
                    cure="delete the tag; the suite is then run again",
                ) from err
    return found


def write_result(outputs: Path, version: ModelVersion, name: str, result: SuiteResult, tag: str = TAG) -> None:
    """Put the result on the version."""
    client(outputs).set_model_version_tag(version.name, version.version, tag + name, canonical_json(asdict(result)))


def episodes_of(outputs: Path, version: ModelVersion, name: str, result: SuiteResult) -> pl.DataFrame:
    """The episodes that a recorded result counts (task, initial_state, seed, success); StageError where they are gone
    or not those that were recorded."""
    mlflow, store = mlflow_module(), client(outputs)
    cure = f"`prts regress --version {version.version} --suite {name}` runs it again"
    try:
        if not result.run_id:
            found = policy_episodes(registry.version_files(outputs, version, registry.EPISODES))
        elif (folder := local_path(store.get_run(result.run_id).info.artifact_uri)) is not None:
            found = policy_episodes(folder / EPISODES)
        else:
            with tempfile.TemporaryDirectory() as target:
                found = policy_episodes(Path(store.download_artifacts(result.run_id, EPISODES, target)))
    except (mlflow.exceptions.MlflowException, DataError, OSError) as err:
        raise StageError(
            f"The episodes of version {version.version} on {name!r} are gone from MLflow",
            field=result.run_id,
            found=" ".join(str(err).split())[:200],
            cure=cure,
        ) from err
    if result.episodes_digest and digest_of(found) != result.episodes_digest:
        raise StageError(
            f"The episodes of version {version.version} on {name!r} are not those that were recorded",
            found=digest_of(found),
            expected=result.episodes_digest,
            cure=cure,
        )
    return found


class SuiteRunLog:
    """The MLflow run of one suite on one version; `with` ends it, as failed where an error goes through."""

    def __init__(
        self, outputs: Path, recipe: str, version: ModelVersion, name: str, attempt: str, caller: dict[str, str]
    ) -> None:
        self.store, self.version, self.name = client(outputs), version, name
        experiment, uri = experiment_id(outputs, recipe), tracking_uri(outputs)
        tags = {
            "prts.stage": "regression",
            "prts.recipe": recipe,
            "prts.suite": name,
            "prts.attempt": attempt,
            "prts.model": f"models:/{version.name}/{version.version}",
            **source_tags(),
            **caller,
        }
        run_name = f"regression {name} v{version.version}"
        self.run_id = self.store.create_run(experiment, run_name=run_name, tags=tags).info.run_id
        self.url = run_url(uri, experiment, self.run_id)

    def __enter__(self) -> SuiteRunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.store.set_terminated(self.run_id, "FINISHED" if kind is None else "FAILED")

    def keep(self, result: SuiteResult, folder: Path, recorded: bool) -> None:
        """The rate, labels and files. recorded: the version's own result, which its logged model shows too."""
        model = self.version.tags.get("prts.model_id") if recorded else None
        self.store.log_metric(self.run_id, f"success_rate/{self.name}", result.rate.estimate, model_id=model)
        self.store.log_metric(self.run_id, "alarm", float(result.alarm))
        for key in ("protocol_digest", "standins", "dtype"):
            self.store.set_tag(self.run_id, f"prts.{key}", getattr(result, key) or "none")
        for file in (EPISODES, REPORT, "page.html"):
            if (folder / file).is_file():
                self.add(folder / file)

    def add(self, file: Path) -> None:
        self.store.log_artifact(self.run_id, str(file))
