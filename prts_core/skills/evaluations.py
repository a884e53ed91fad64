"""Read, check and make records of evaluations: eval/*.json of a package.

A record of ours is bound to its package: it names the package's digest, and has a digest of its own over everything
else it says. Both stand where the public schema allows keys that it does not know. A digest finds what was edited or
put beside other weights, by whomever; it is no signature, and says nothing of who measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from prts_core.config.checked_yaml import check
from prts_core.config.checks import Lenient
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_value, read_json, write_json
from prts_core.skills.digests import EVALUATIONS, package_digest

RECORD_DIGEST, PACKAGE_DIGEST, PROTOCOL_DIGEST = "record_digest", "package_digest", "protocol_digest"
EVALUATED_BY = "PRTS:prts benchmark"
CURE = "correct what is named above; docs/how-to/skills.md says what a record holds"
MEASURE_AGAIN = "measure this package again, or restore the record from where it was measured"


@dataclass(frozen=True)
class EvaluationSource(Lenient):
    """Who measured. reproduced_locally: whether that was whoever publishes the record; else the numbers are a paper's.
    reproduction_cli: the command that measures again."""

    paper: str
    model_variant: str
    evaluated_by: str
    reproduced_locally: bool
    arxiv: str | None = None
    reproduction_planned: str | None = None
    reproduction_cli: dict[str, Any] | str | None = None
    table: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class EvaluationBenchmark(Lenient):
    """What was measured on. protocol: in words."""

    name: str
    protocol: str
    robot: str
    simulator: str
    dataset: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Lenient):
    """One record, as far as the schema knows it; `document` holds the whole of it, keys of others included.

    results: free; success rates are in [0, 1] by convention, and nothing in the schema holds them there.
    """

    source: EvaluationSource
    benchmark: EvaluationBenchmark
    results: dict[str, Any]
    schema_version: str = "0.1"
    eval_config: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, Any] = field(default_factory=dict)
    trace_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    document: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def is_bound(self) -> bool:
        """Whether the record names the package that it was measured on."""
        return PACKAGE_DIGEST in self.document


def check_evaluation(document: Any, where: object) -> Evaluation:
    """A record of plain data that came from `where`; ConfigError with every fault."""
    record = check(Evaluation, document, where, what="record of an evaluation", cure=CURE)
    object.__setattr__(record, "document", document)
    return record


def read_evaluation(path: Path) -> Evaluation:
    """One record; DataError where the file is no JSON, ConfigError with every fault of what it says."""
    return check_evaluation(read_json(path), path)


def read_evaluations(package: Path) -> dict[str, Evaluation]:
    """Every record of a package, by the file's name without its ending."""
    return {path.stem: read_evaluation(path) for path in sorted((package / EVALUATIONS).glob("*.json"))}


# ---- records of ours -------------------------------------------------------------------------------------------------
def make_evaluation(
    *,
    suite: str,
    robot: str,
    simulator: str,
    protocol: str,
    protocol_digest: str,
    package_digest: str,
    model_variant: str,
    successes: Mapping[str, int],
    episodes: Mapping[str, int],
    latency_ms: float | None = None,
    paper: str = "none: measured here",
    command: str | None = None,
    eval_config: Mapping[str, Any] | None = None,
    baselines: Mapping[str, Any] | None = None,
) -> Evaluation:
    """A record of a benchmark that was run here.

    successes, episodes: of each task, by its id. latency_ms: of a step, mean over all. protocol: in words, for readers;
    protocol_digest: of everything that makes two results comparable. command: what measures again. eval_config,
    baselines: free. The mean success rate is that over tasks, each of equal weight. ConfigError for counts that cannot
    be.
    """
    _check_counts(successes, episodes, latency_ms)
    rates = {task: successes[task] / episodes[task] for task in episodes}
    equal = len(set(episodes.values())) == 1
    results: dict[str, Any] = {f"{task}_success_rate": rate for task, rate in rates.items()}
    results |= {
        "avg_success_rate": math.fsum(rates.values()) / len(rates),
        "n_tasks": len(rates),
        "n_episodes_per_task": next(iter(episodes.values())) if equal else None,
        "n_episodes_total": sum(episodes.values()),
        "mean_step_latency_ms_avg": latency_ms,
        "successes": dict(successes),
        "episodes": dict(episodes),
    }
    document: dict[str, Any] = {
        "schema_version": "0.1",
        "source": {
            "paper": paper,
            "model_variant": model_variant,
            "evaluated_by": EVALUATED_BY,
            "reproduced_locally": True,
            "reproduction_cli": command,
            "status": "reproduced",
        },
        "benchmark": {
            "name": suite,
            "protocol": protocol,
            "robot": robot,
            "simulator": simulator,
            PROTOCOL_DIGEST: protocol_digest,
        },
        "eval_config": dict(eval_config or {}),
        "results": {name: value for name, value in results.items() if value is not None},
        "baselines": dict(baselines or {}),
        PACKAGE_DIGEST: package_digest,
    }
    document[RECORD_DIGEST] = _digest(document)
    return check_evaluation(document, f"the record of {suite}")


def write_evaluation(package: Path, name: str, **measured: Any) -> Path:
    """Make a record (`make_evaluation`) and write it as eval/<name>.json of a package."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError("A record's name becomes a file's", field="name", found=name, expected="such as libero_10")
    path = package / EVALUATIONS / f"{name}.json"
    write_json(path, make_evaluation(**measured).document)
    return path


def verify_evaluation(record: Evaluation, package_digest: str, where: object = None) -> None:
    """DataError unless the record is as it was made, and was made of the package of this digest (`package_digest`)."""
    for name in (RECORD_DIGEST, PACKAGE_DIGEST):
        if not isinstance(record.document.get(name), str):
            raise DataError(
                "A record of an evaluation is bound to no package",
                file=where,
                field=name,
                found="nothing",
                expected="sha256:...",
                cure=MEASURE_AGAIN,
            )
    made = _digest(record.document)
    if record.document[RECORD_DIGEST] != made:
        raise DataError(
            "A record of an evaluation was changed after it was made",
            file=where,
            field=RECORD_DIGEST,
            found=record.document[RECORD_DIGEST],
            expected=made,
            cure=MEASURE_AGAIN,
        )
    if record.document[PACKAGE_DIGEST] != package_digest:
        raise DataError(
            "A record of an evaluation belongs to another package",
            file=where,
            field=PACKAGE_DIGEST,
            found=record.document[PACKAGE_DIGEST],
            expected=package_digest,
            cure=MEASURE_AGAIN,
        )


def verify_evaluations(package: Path, digest: str | None = None) -> None:
    """DataError unless every record of a package that names a package names this one, and is as it was made. digest: of
    the package, where it is known."""
    for name, record in read_evaluations(package).items():
        if record.is_bound:
            digest = digest or package_digest(package)
            verify_evaluation(record, digest, package / EVALUATIONS / f"{name}.json")


def _digest(document: dict[str, Any]) -> str:
    try:
        return digest_value({name: value for name, value in document.items() if name != RECORD_DIGEST})
    except ValueError as err:  # NaN or infinity, which Python's JSON reads
        raise DataError("A record of an evaluation holds a number that is not finite", found=str(err)) from err


def _check_counts(successes: Mapping[str, int], episodes: Mapping[str, int], latency_ms: float | None) -> None:
    faults = [
        f"{task}: {successes.get(task)!r} of {count!r}"
        for task, count in episodes.items()
        if not (
            isinstance(count, int)
            and count > 0
            and isinstance(successes.get(task), int)
            and 0 <= successes[task] <= count
        )
    ]
    faults += [f"{task}: successes without episodes" for task in successes.keys() - episodes.keys()]
    if not episodes:
        faults.append("no task at all")
    if latency_ms is not None and not (math.isfinite(latency_ms) and latency_ms >= 0):
        faults.append(f"latency_ms {latency_ms!r}")
    if faults:
        raise ConfigError(
            "These are no counts of a benchmark",
            field="successes, episodes, latency_ms",
            found="; ".join(faults[:6]),
            expected="of each task at least one episode, and no more successes than that",
        )
