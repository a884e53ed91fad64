"""Records of evaluations: what is made is sound and bound, what is changed or moved elsewhere is found."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError, DataError
from prts_core.skills.digests import package_digest
from prts_core.skills.evaluations import (
    check_evaluation,
    make_evaluation,
    read_evaluation,
    read_evaluations,
    verify_evaluation,
    write_evaluation,
)
from tests.skills.made_packages import write_package

DIGEST = "sha256:" + "a" * 64
MEASURED: dict[str, Any] = {
    "suite": "libero_10",
    "robot": "franka_panda",
    "simulator": "LIBERO",
    "protocol": "10 episodes a task",
    "protocol_digest": "sha256:" + "b" * 64,
    "package_digest": DIGEST,
    "model_variant": "owner/rskill-pick-cube 0.1.0",
    "successes": {"libero_10/0": 7, "libero_10/1": 10},
    "episodes": {"libero_10/0": 10, "libero_10/1": 10},
    "latency_ms": 41.5,
    "command": "prts benchmark --config configs/mine.yaml",
    "eval_config": {"seed": 7, "note": None},
}


def test_a_record_says_what_was_measured():
    record = make_evaluation(**MEASURED)
    assert record.is_bound and record.source.reproduced_locally and record.benchmark.name == "libero_10"
    results = record.results
    assert results["libero_10/0_success_rate"] == 0.7 and results["avg_success_rate"] == 0.85
    assert (results["n_tasks"], results["n_episodes_per_task"], results["n_episodes_total"]) == (2, 10, 20)
    assert results["mean_step_latency_ms_avg"] == 41.5
    uneven = make_evaluation(**MEASURED | {"episodes": {"libero_10/0": 7, "libero_10/1": 20}, "latency_ms": None})
    assert uneven.results["avg_success_rate"] == 0.75, "of tasks, each of equal weight"
    assert not {"n_episodes_per_task", "mean_step_latency_ms_avg"} & set(uneven.results)


@pytest.mark.parametrize(
    "change",
    [
        {"episodes": {}, "successes": {}},
        {"successes": {"libero_10/0": 11, "libero_10/1": 0}},
        {"successes": {"libero_10/0": 1}},
        {"successes": {"libero_10/0": 1, "libero_10/1": 1, "x": 1}},
        {"episodes": {"libero_10/0": 0, "libero_10/1": 10}},
        {"latency_ms": float("nan")},
        {"latency_ms": -1.0},
    ],
)
def test_counts_that_cannot_be_are_refused(change: dict[str, Any]):
    with pytest.raises(ConfigError, match="no counts of a benchmark"):
        make_evaluation(**MEASURED | change)


def test_a_record_of_a_package_is_bound_to_it(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    path = write_evaluation(package, "libero_10", **MEASURED | {"package_digest": package_digest(package)})
    assert [*read_evaluations(package)] == ["libero_10"]
    verify_evaluation(read_evaluation(path), package_digest(package), path)
    (package / "weights" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(DataError, match="belongs to another package"):
        verify_evaluation(read_evaluation(path), package_digest(package), path)


def test_a_package_is_its_files_but_not_the_records_made_of_it(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    before = package_digest(package)
    write_evaluation(package, "libero_10", **MEASURED)
    (package / ".cache").mkdir()
    (package / ".cache" / "x").touch()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").touch()
    assert package_digest(package) == before
    (package / "README.md").touch()
    assert package_digest(package) != before


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x"])
def test_a_record_stays_in_its_folder(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="name becomes a file"):
        write_evaluation(tmp_path, name, **MEASURED)
    assert not [*tmp_path.iterdir()]


def leaves(document: Any, path: tuple = ()) -> list[tuple]:
    if isinstance(document, dict) and document:
        return [leaf for key, inner in document.items() for leaf in leaves(inner, (*path, key))]
    return [path]


RECORD = make_evaluation(**MEASURED).document


@given(at=st.sampled_from(leaves(RECORD)), value=st.none() | st.integers(0, 5) | st.floats(0, 1) | st.text(max_size=5))
def test_any_change_of_any_value_is_found(at: tuple, value: Any):
    changed = copy.deepcopy(RECORD)
    place = changed
    for part in at[:-1]:
        place = place[part]
    if json.dumps(place[at[-1]]) == json.dumps(value):
        return
    place[at[-1]] = value
    with pytest.raises((DataError, ConfigError)):
        verify_evaluation(check_evaluation(changed, "a test"), DIGEST)


@given(key=st.text(max_size=8), value=st.integers())
def test_a_key_that_is_put_in_is_found(key: str, value: int):
    for place in ((), ("source",), ("benchmark",), ("results",)):
        changed = copy.deepcopy(RECORD)
        inner = changed
        for part in place:
            inner = inner[part]
        if key in inner:
            continue
        inner[key] = value
        with pytest.raises(DataError):
            verify_evaluation(check_evaluation(changed, "a test"), DIGEST)


def test_a_record_survives_any_spelling_of_its_file(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dict(reversed(RECORD.items()))))
    verify_evaluation(read_evaluation(path), DIGEST)


def test_a_record_that_is_bound_to_nothing_is_not_verified():
    paper = {key: value for key, value in RECORD.items() if "digest" not in key}
    with pytest.raises(DataError, match="bound to no package"):
        verify_evaluation(check_evaluation(paper, "a test"), DIGEST)
    infinite = RECORD | {"eval_config": {"x": float("inf")}}
    with pytest.raises(DataError, match="not finite"):
        verify_evaluation(check_evaluation(infinite, "a test"), DIGEST)
    with pytest.raises(DataError, match="not finite"):
        make_evaluation(**MEASURED | {"eval_config": {"x": float("nan")}})


def test_a_key_named_like_ours_is_only_a_key():
    assert check_evaluation(RECORD | {"document": "x"}, "a test").document["document"] == "x"
