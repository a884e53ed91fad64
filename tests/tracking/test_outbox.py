"""The outbox: calls in order, made again after a failure, and nobody who waits for them longer than stated."""

from __future__ import annotations

import threading
import time

import pytest

from prts_core.tracking import outbox
from prts_core.tracking.outbox import Outbox


class Refused(Exception):
    pass


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def box(told, monkeypatch):
    monkeypatch.setattr(outbox, "RETRY_SECONDS", (0.05,))
    made = Outbox(lambda err: isinstance(err, Refused), lambda what, err: told.append(what))
    yield made
    made.stop()


def failing(times: int, done: list, name: str, error: type[Exception] = ConnectionError):
    left = [times]

    def call() -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error("away")
        done.append(name)

    return call


def test_calls_are_made_in_order_and_again_after_a_failure(box, told):
    done: list[str] = []
    box.put("run", failing(2, done, "run"), gate=True)
    for name in ("tags", "files", "end"):
        box.put(name, failing(0, done, name))
    assert box.flush(60)
    assert done == ["run", "tags", "files", "end"] and told == ["run", "run"] and box.missing() == {}


def test_one_failing_call_holds_up_no_other(box):
    done: list[str] = []
    box.put("files", failing(10**6, done, "files"))
    box.put("tags", failing(0, done, "tags"))
    assert box.settled("tags", 60)
    assert not box.flush(0.3)
    assert done == ["tags"] and box.missing() == {"files": "ConnectionError: away"}


def test_a_hopeless_call_is_given_up_and_a_hopeless_gate_ends_everything(box):
    done: list[str] = []
    box.put("parameters", failing(10**6, done, "parameters", Refused))
    box.put("tags", failing(0, done, "tags"))
    begun = time.monotonic()
    assert box.flush(120) and time.monotonic() - begun < 60
    assert done == ["tags"] and box.missing() == {"parameters": "Refused: away"}
    box.put("run", failing(10**6, done, "run", Refused), gate=True)
    box.put("late", failing(0, done, "late"))
    assert box.flush(60) and box.stopped
    box.put("later", failing(0, done, "later"))
    assert done == ["tags"] and box.missing()["run"] == "Refused: away"


def test_a_call_that_hangs_is_left_to_itself(box):
    hang = threading.Event()
    begun = time.monotonic()
    box.put("run", hang.wait, gate=True)
    box.put("tags", lambda: None)
    assert not box.settled("run", 0.2)
    assert not box.flush(0.3)
    assert not box.flush(120)  # given up once: now only the grace
    assert time.monotonic() - begun < 60
    assert box.missing() == {"run": "not sent in time", "tags": "not sent in time"}
    hang.set()
    assert box.flush(60) and box.missing() == {}


def test_failures_in_a_row_do_not_add_up(box):
    def slow() -> None:
        time.sleep(0.2)
        raise ConnectionError("away")

    for number in range(500):
        box.put(str(number), slow)
    begun = time.monotonic()
    assert not box.flush(0.5)
    assert time.monotonic() - begun < 50  # half of what one failure of each takes


def test_a_long_upload_is_waited_for_while_nothing_fails(box):
    box.put("artifact", lambda: time.sleep(1.0), seconds=60)
    assert box.flush(0.2)


def test_a_call_that_waits_already_stands_for_both_and_later_ones_wait(box):
    done: list[str] = []
    for _ in range(3):
        box.put("metrics", lambda: done.append("metrics"), after=60)
    time.sleep(0.1)
    assert done == []
    assert box.flush(60) and done == ["metrics"]
