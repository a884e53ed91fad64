"""The queue of chunks against policies whose answers come exactly when a test lets them: no clock decides anything."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.robot.action_queue import ActionQueue, Starved
from prts_core.robot.cadence import Cadence
from prts_core.robot.connection import LastingConnection, ServerGone

CHUNK = 8


class Scripted:
    """Row j of the n-th chunk is [n, step + j]. Once `slow` is set each answer waits for `let`."""

    def __init__(self, bridges: bool = True, clock: list[float] | None = None, costs_s: float = 0.0) -> None:
        self.bridges, self.connection = bridges, LastingConnection(lambda: None, 1.0)  # type: ignore[type-var]
        self.asked: list[dict[str, Any]] = []
        self.slow, self.clock, self.costs_s = False, clock, costs_s
        self.let, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.fault: Exception | None = None
        self.closed = False

    def chunk(self, observation: dict[str, Any], *, step: int, delay: int | None, reset: bool) -> np.ndarray:
        self.asked.append({"step": step, "delay": delay, "reset": reset, **observation})
        if self.clock is not None:
            self.clock[0] += self.costs_s
        if self.slow:
            self.waits.release()
            assert self.let.acquire(timeout=60)
        if self.fault is not None:
            raise self.fault
        return np.stack([np.full(CHUNK, len(self.asked)), step + np.arange(CHUNK)], axis=1).astype(np.float32)

    def close(self) -> None:
        self.closed = True


def begun(policy: Scripted, **options: Any) -> ActionQueue:
    """A queue at 10 Hz after its start; from now on answers come when the test says so."""
    queue = ActionQueue(policy, 10.0, clock=lambda: 0.0, **options)
    queue.start({})
    policy.slow = True
    return queue


def steps(queue: ActionQueue, count: int) -> list[list[float]]:
    return [queue.next(dict).tolist() for _ in range(count)]


def answer(policy: Scripted, queue: ActionQueue) -> None:
    """The look that is under way is answered before the next control step."""
    assert policy.waits.acquire(timeout=60) and queue._look is not None
    policy.let.release()
    queue._look.answer.exception(60)


def test_the_first_inference_is_excluded_and_the_second_measures_the_delay():
    clock = [0.0]
    policy = Scripted(clock=clock)
    costs = iter([30.0, 0.21])  # seconds: weights that warm up, then what an answer takes

    def chunk(*args: Any, **kwargs: Any) -> np.ndarray:
        policy.costs_s = next(costs)
        return Scripted.chunk(policy, *args, **kwargs)

    policy.chunk = chunk  # type: ignore[method-assign]
    queue = ActionQueue(policy, 10.0, clock=lambda: clock[0])
    assert queue.delay is None
    queue.start({})
    assert queue.delay == 3, "0.21 s at 10 Hz"
    assert [asked["delay"] for asked in policy.asked] == [None, None], "nothing is told that was not measured"
    queue.close()
    assert policy.closed


def test_a_chunk_is_placed_in_time_and_the_delay_told_is_the_longest_measured():
    policy = Scripted()
    queue = begun(policy, look_every=4)
    assert queue.delay == 1, "a fake clock that stands still: less than a step is one"
    assert steps(queue, 5) == [[2, row] for row in range(5)]  # asked at step 4
    assert policy.waits.acquire(timeout=60)
    assert policy.asked[-1] == {"step": 4, "delay": 1, "reset": False}
    assert steps(queue, 1) == [[2, 5]]
    policy.let.release()
    queue._look.answer.exception(60)
    # The chunk asked for at step 4 is here at step 6: its row 2.
    assert steps(queue, 1) == [[3, 6]] and queue.delay == 2
    assert steps(queue, 2) == [[3, 7], [3, 8]]  # the next look begins at step 8
    answer(policy, queue)
    assert policy.asked[-1] == {"step": 8, "delay": 2, "reset": False}
    assert steps(queue, 1) == [[4, 9]]
    cadence = queue.cadence
    assert (cadence.looks, cadence.longest_delay, cadence.starved, cadence.steps) == (2, 2, 0, 10)
    assert cadence.overrun == 1, "the first look was expected to take one step, and took two"
    queue.close()


def test_one_look_at_a_time_and_earlier_where_the_delay_is_long():
    policy = Scripted()
    queue = begun(policy, look_every=7)
    queue._delays.append(3)
    steps(queue, 6)
    assert policy.waits.acquire(timeout=60)
    assert policy.asked[-1]["step"] == 5, "chunk 8, delay 3: later the rows would end before the answer is here"
    steps(queue, 2)
    assert len(policy.asked) == 3
    policy.let.release()
    queue.close()


def test_a_server_slower_than_the_chunk_lasts_is_reported_and_the_last_action_held():
    policy = Scripted()
    queue = begun(policy, look_every=4, when_starved="hold")
    assert steps(queue, 12)[-4:] == [[2, 7]] * 4 and queue.cadence.starved == 4
    answer(policy, queue)
    assert steps(queue, 1) == [[2, 7]], "the whole chunk is of the past: held, and asked again at once"
    assert queue.cadence.starved == 5 and queue.delay == 8
    assert policy.waits.acquire(timeout=60) and policy.asked[-1] == {"step": 12, "delay": None, "reset": False}
    assert queue.cadence.unbridged == 1, "a delay of 8 does not fit a chunk of 8"
    assert "5 starved" in str(queue.cadence) and "1 looks too slow" in str(queue.cadence)
    policy.let.release()
    queue.close()


def test_the_user_may_stop_or_send_something_else_instead():
    policy = Scripted()
    queue = begun(policy)  # nothing is repeated that may be a displacement, unless the user says that it is none
    steps(queue, 8)
    told = r"chunk has ended.*a chunk of 8 steps; looks take 1 steps.*Cure: .*look_every.*hold\" where actions are pos"
    with pytest.raises(Starved, match=told):
        queue.next(dict)
    policy.let.release()
    queue.close()
    policy = Scripted()
    queue = begun(policy, when_starved=np.zeros(2, np.float32))
    assert steps(queue, 9)[-1] == [0, 0]
    policy.let.release()
    queue.close()


def test_a_chunk_asked_for_before_the_connection_was_lost_is_not_executed():
    policy = Scripted()
    queue = begun(policy, look_every=2)
    steps(queue, 3)
    policy.connection.lost += 1  # as LastingConnection does, before it asks again
    answer(policy, queue)
    assert steps(queue, 1) == [[2, 3]], "the chunk before goes on"
    assert policy.waits.acquire(timeout=60)
    assert policy.asked[-1] == {"step": 3, "delay": None, "reset": False}, "the server's chunk is not the one executed"
    assert (queue.cadence.discarded, queue.cadence.looks) == (1, 0) and len(queue._delays) == 1
    policy.let.release()
    queue._look.answer.exception(60)
    assert steps(queue, 1) == [[4, 4]]
    queue.close()


def test_a_server_without_real_time_chunking_is_told_no_delay_it_would_refuse():
    policy = Scripted(bridges=False)
    queue = begun(policy, look_every=4)
    steps(queue, 5)
    answer(policy, queue)
    assert steps(queue, 1) == [[3, 5]], "rows are dropped by time all the same"
    assert queue.cadence.unbridged == 0
    queue.close()


def test_another_task_resets_the_session_and_asks_once():
    policy = Scripted()
    queue = begun(policy)
    steps(queue, 3)
    policy.slow = False
    queue.start({"prompt": "another"})
    assert policy.asked[-1] == {"step": 0, "delay": None, "reset": True, "prompt": "another"} and len(policy.asked) == 3
    assert queue.next(dict).tolist() == [3, 0] and queue.cadence.late == 0
    queue.close()


def test_a_refusal_reaches_the_control_loop():
    policy = Scripted()
    queue = begun(policy, look_every=1)
    policy.fault = ServerGone("The policy server stayed away")
    steps(queue, 2)
    answer(policy, queue)
    with pytest.raises(ServerGone, match="stayed away"):
        queue.next(dict)
    queue.close()


@pytest.mark.parametrize("chunk", [np.zeros(4), np.zeros((0, 2)), np.full((4, 2), np.nan), np.array([["a"]])])
def test_what_is_no_chunk_is_refused_before_the_robot_moves(chunk: np.ndarray):
    policy = Scripted()
    policy.chunk = lambda *args, **kwargs: chunk  # type: ignore[method-assign]
    with ActionQueue(policy, 10.0) as queue, pytest.raises(ServeError, match=r"no chunk.*Expected: finite numbers"):
        queue.start({})


def test_settings_that_say_nothing_are_refused():
    for options in ({"control_hz": 0.0}, {"control_hz": 10.0, "look_every": 0}):
        with pytest.raises(ServeError, match="a rate above 0"):
            ActionQueue(Scripted(), **options)
    with pytest.raises(ServeError, match=r"Found: wait.*hold"):
        ActionQueue(Scripted(), 10.0, when_starved="wait")  # type: ignore[arg-type]
    with ActionQueue(Scripted(), 10.0) as queue, pytest.raises(ServeError, match="call `start`"):
        queue.next(dict)


def test_the_loop_counts_and_ends_when_told():
    policy, done = Scripted(), []
    with ActionQueue(policy, 1000.0, when_starved="hold") as queue:
        cadence = queue.run(dict, done.append, steps=20)
        assert cadence.steps == len(done) == 20 and cadence.mean_s > 0
        stop = threading.Event()
        queue.run(dict, lambda action: stop.set(), stop=stop)
    assert cadence.steps == 21


def test_cadence_tells_late_steps_from_pauses():
    cadence = Cadence(0.1)
    for now in (10.0, 10.1, 10.24, 10.40, 10.5):
        cadence.begins(now)
    cadence.pauses()
    cadence.begins(99.0)
    assert (cadence.steps, cadence.late) == (6, 1) and cadence.mean_s == pytest.approx(0.125)
    told = cadence.to_json()
    assert told["planned_s"] == 0.1 and told["longest_s"] == pytest.approx(0.16) and told["mean_delay"] is None
    assert Cadence(0.1).to_json()["mean_s"] is None
