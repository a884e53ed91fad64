"""Events for TensorBoard: read back by its own reader, under the names and steps that MLflow has."""

from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path

import pytest

from prts_core.io.errors import install_extra
from prts_core.tracking import tensorboard
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client
from prts_core.tracking.tensorboard import event_log
from tests.fixtures.toy_stages import toy_work

POINTS = [
    ({"eval/success_once": 0.25, "eval/task/door-open": 0.5, "time/evaluation": 2.5}, 0),
    ({"train/actor/approx_kl": -0.01, "train/critic/explained_variance": math.nan, "rollout/rewards": 0.1}, 0),
    ({"train/actor/approx_kl": 0.02, "train/critic/explained_variance": 0.5, "env/return": math.inf}, 1),
]
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the optional package tensorboard is not installed"
)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_every_point_is_read_back_under_its_own_name(tmp_path):
    told = []
    with event_log(tmp_path, True, lambda metrics, step: told.append((metrics, step))) as log:
        for metrics, step in POINTS:
            log(metrics, step)
        found = read(tmp_path)  # on disk before the log is closed
    assert told == POINTS
    assert set(found) == {name for metrics, _ in POINTS for name in metrics}
    assert found["train/actor/approx_kl"] == [(0, pytest.approx(-0.01)), (1, pytest.approx(0.02))]
    (first, _), (_, later) = found["train/critic/explained_variance"], found["train/critic/explained_variance"][1]
    assert math.isnan(first[1]) and later == 0.5 and math.isinf(found["env/return"][0][1])


@needs_tensorboard
def test_an_attempt_that_goes_on_replaces_what_it_comes_to_again(tmp_path):
    for begin, value in ((0, 1.0), (2, 2.0)):
        with event_log(tmp_path, True, lambda metrics, step: None) as log:
            for step in range(begin, 4):
                log({"env/return": value}, step)
    assert read(tmp_path)["env/return"] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_nothing_is_written_and_nothing_needed_unless_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "EventLog", None)
    told = []
    with event_log(tmp_path / "events", False, lambda metrics, step: told.append(step)) as log:
        log({"a": 1.0}, 3)
    assert told == [3] and not (tmp_path / "events").exists()


def test_where_the_package_is_absent_one_line_says_what_to_install(tmp_path, monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    told = []
    with (
        caplog.at_level(logging.WARNING, "prts.tracking"),
        event_log(tmp_path, True, lambda metrics, step: told.append(step)) as log,
    ):
        log({"a": 1.0}, 0)
        log({"a": 1.0}, 1)
    assert told == [0, 1] and len(caplog.records) == 1
    assert install_extra("tensorboard") in caplog.text


def test_mlflow_takes_the_same_names_and_what_is_no_number(outputs):
    with stage_run(toy_work(outputs, key="rl")) as tracked:
        for metrics, step in POINTS:
            tracked.log(metrics, step)
    store = client(outputs)
    run = store.get_run(tracked.run_id)
    assert set(run.data.metrics) == {name for metrics, _ in POINTS for name in metrics}
    curve = store.get_metric_history(tracked.run_id, "train/critic/explained_variance")
    assert [point.step for point in curve] == [0, 1] and math.isnan(curve[0].value) and curve[1].value == 0.5
    assert run.data.metrics["eval/task/door-open"] == 0.5 and "fault" not in tracked.links()
