"""One engine, several versions and sessions: who is answered by what, from which chunk, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from prts_core.contract import PolicyContract
from prts_core.io.errors import ContractError, ServeError
from prts_core.policy.observation import STATE, Answer, TwoSteps, UnderWay
from prts_core.serving.engine import Engine, Limits, Reply, _Request
from prts_core.serving.observations import Observation
from prts_core.serving.replicas import ProcessLost
from prts_core.serving.sessions import Session, Sessions
from prts_core.serving.versions import Version, Versions
from prts_core.value.alarm import Alarm, Course, Scores
from tests.serving.fake_policy import CONTRACT, FakePolicy, Held


@dataclass
class Speaks:
    """Says a subtask before it acts; the chunk is the number of its words, or goes on from what is under way."""

    contract: PolicyContract = CONTRACT
    speaks: bool = True
    spoken: int = 0

    def drift(self, state: np.ndarray) -> np.ndarray:
        return np.full(len(state), 2.0)

    met: list[UnderWay | None] = field(default_factory=list)

    def answer(self, observation, instruction, seeds, subtask=None, value=False, under_way=None, draws=1) -> Answer:
        self.met.append(under_way)
        said = None
        if subtask is None:
            said = [f"{text} {self.spoken + i}" for i, text in enumerate(instruction)]
            self.spoken += len(said)
        count = len(observation[STATE])
        actions = np.tile(np.arange(4.0)[None, :, None], (count, 1, 2)) + np.asarray(seeds)[:, None, None]
        if under_way is not None:
            for own, rows, delay in zip(actions, under_way.rows, under_way.delay, strict=True):
                own[:delay] = rows[:delay]
        return Answer(actions.astype(np.float32), np.arange(count, dtype=np.float32) if value else None, said)


def seen(prompt: str = "open", **more: Any) -> Observation:
    images = {camera.key: np.zeros((8, 8, 3), np.uint8) for camera in CONTRACT.contract.cameras}
    return Observation(images, np.zeros(3, np.float32), prompt, **more)


def live(engine: Engine, what: Coroutine[Any, Any, Any]) -> Any:
    async def body() -> Any:
        serving = asyncio.create_task(engine.run())
        try:
            return await asyncio.wait_for(what, 30)
        finally:
            serving.cancel()
            engine.close()

    return asyncio.run(body())


def test_words_belong_to_a_session_and_serve_for_some_looks():
    policy = Speaks()
    version = Version("1", policy)
    one, other = Session("one", version), Session("other", version)
    engine = Engine(Limits(subtask_looks=2))

    async def talk() -> list[list[str | None]]:
        told = []
        for _ in range(3):
            replies = await asyncio.gather(engine.ask(seen(seed=1), one), engine.ask(seen(seed=2, value=True), other))
            told.append([reply.subtask for reply in replies])
            assert [float(reply.actions[0, 0]) for reply in replies] == [1.0, 2.0]
            assert replies[0].value is None and replies[1].value is not None
        told.append([(await engine.ask(seen("close", seed=1), one)).subtask])  # another sentence, other words
        told.append([(await engine.ask(seen("close", seed=1), one)).subtask])
        return told

    told = live(engine, talk())
    assert told[0] == told[1] and told[0][0] != told[0][1]  # the same prompt, two robots
    assert set(told[2]).isdisjoint(told[0])
    assert told[3] == told[4] and "close" in str(told[3][0])


def test_a_chunk_goes_on_from_the_one_under_way():
    policy = Speaks(speaks=False)
    session, engine = Session("robot", Version("1", policy)), Engine(Limits())

    async def act() -> list[Reply]:
        replies = []
        for step, delay in ((0, 1), (2, 1), (None, None), (4, 1)):
            session.told(step)
            replies.append(await engine.ask(seen(seed=10 * len(replies), step=step, delay=delay), session))
        return replies

    replies = live(engine, act())
    assert [reply.held for reply in replies] == [
        0,
        1,
        0,
        0,
    ]  # nothing under way; row 2 of it; not asked for; not counted
    under_way = policy.met[1]
    assert under_way is not None
    assert under_way.rows[0, :, 0].tolist() == [2, 3, 3, 3] and under_way.executed.tolist() == [2]
    assert replies[1].actions[:, 0].tolist() == [2, 11, 12, 13]
    with pytest.raises(ServeError, match="run backwards"):
        session.told(3)


def test_a_robot_that_asks_again_at_once_goes_on_from_what_it_has():
    """Asynchronous from the first chunk on: nothing of it is executed when the next look is taken."""
    policy = Speaks(speaks=False)
    session, engine = Session("robot", Version("1", policy)), Engine(Limits())

    async def act() -> list[Reply]:
        return [await engine.ask(seen(seed=10 * i, step=0, delay=delay), session) for i, delay in enumerate((0, 2, 0))]

    replies = live(engine, act())
    assert [reply.held for reply in replies] == [0, 2, 0]
    assert replies[1].actions[:, 0].tolist() == [0, 1, 12, 13]
    assert policy.met[1] is not None and policy.met[1].executed.tolist() == [2]


def test_a_robot_whose_policy_gives_fresh_chunks_is_not_told_that_rows_were_held():
    session, engine = Session("robot", Version("1", FakePolicy())), Engine(Limits())

    async def act() -> list[Reply]:
        return [await engine.ask(seen(seed=step, step=step, delay=1), session) for step in (0, 2)]

    assert [reply.held for reply in live(engine, act())] == [0, 0]


def test_a_delay_that_no_chunk_can_bridge_is_the_clients_error_before_anybody_waits():
    session = Session("robot", Version("1", FakePolicy()))
    session.answered(seen(step=0), np.zeros((4, 2), np.float32), None, 1)
    with pytest.raises(ServeError, match=r"too short for real-time chunking.*look again sooner"):
        session.left(2, 3, 4)
    assert session.left(9, 1, 4) is None and session.left(2, None, 4) is None


def test_an_answer_to_the_task_before_does_not_reach_the_one_after():
    policy, sessions = Speaks(), Sessions(4)
    version, engine = Version("1", policy), Engine(Limits(subtask_looks=5))

    async def act() -> tuple[Reply, Reply]:
        asking = asyncio.create_task(engine.ask(seen("task one", step=7), sessions.get("robot", version)))
        await asyncio.sleep(0)
        sessions.renew("robot")
        old = await asking
        return old, await engine.ask(seen("task two", step=0), sessions.get("robot", version))

    old, new = live(engine, act())
    assert "task one" in str(old.subtask) and "task two" in str(new.subtask)
    assert sessions.open["robot"].chunk_step == 0 and version.sessions == 1


def test_an_answer_that_nobody_waited_for_leaves_no_trace():
    session, engine = Session("robot", Version("1", FakePolicy(delay_s=0.2))), Engine(Limits())

    async def act() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.ask(seen(step=0), session), 0.05)
        await asyncio.sleep(0.4)

    live(engine, act())
    assert session.chunk is None


def test_a_policy_that_cannot_tell_drift_fails_its_request_and_not_the_server():
    class Blind(FakePolicy):
        def drift(self, state):
            raise ValueError("no statistics")

    session, engine = Session("robot", Version("1", Blind())), Engine(Limits())

    async def act() -> None:
        for _ in range(2):
            with pytest.raises(ServeError, match="policy failed"):
                await engine.ask(seen(), session)

    live(engine, act())


def test_more_that_wait_than_allowed_are_told_the_server_is_busy():
    engine = Engine(Limits(max_batch=1, max_waiting=3))
    sessions = [Session(str(i), Version("1", FakePolicy(delay_s=0.05))) for i in range(8)]

    async def crowd() -> list[Any]:
        return await asyncio.gather(*(engine.ask(seen(), session) for session in sessions), return_exceptions=True)

    found = live(engine, crowd())
    assert sum(isinstance(reply, Reply) for reply in found) == 3
    assert all("busy" in str(reply) for reply in found if not isinstance(reply, Reply))


def test_versions_side_by_side():
    """A session keeps its version; a candidate gets its share of names; the one before is kept to fall back to."""
    first, second, third = (Version(name, FakePolicy()) for name in "123")
    versions, sessions = Versions(first), Sessions(4000)
    old = sessions.get("old", versions.of("old"))
    versions.offer(second)
    assert sessions.get("old", versions.of("old")).version is first
    assert sessions.get("new", versions.of("new")).version is second
    versions.offer(third, share=0.25)
    names = [str(i) for i in range(2000)]
    share = sum(versions.of(name) is third for name in names) / len(names)
    assert 0.2 < share < 0.3 and [versions.of(n) for n in names] == [versions.of(n) for n in names]
    assert versions.go_back_to(second) and versions.candidate is None  # a bad candidate loses its share
    assert versions.current is second and not versions.go_back_to(second)
    assert versions.go_back_to(first) and versions.current is first and versions.previous is second
    assert set(versions.held()) == {first, second}
    sessions.close("new")
    sessions.close("old")
    assert old.version is first


def test_a_version_that_means_other_numbers_is_not_offered():
    versions = Versions(Version("1", FakePolicy()))
    wider = replace(CONTRACT.contract, control_hz=5.0)
    with pytest.raises(ContractError, match="control_hz"):
        versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, contract=wider))))
    with pytest.raises(ContractError, match="chunks of another length"):
        versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, chunk_length=8))))
    versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, statistics_digest="sha256:01"))))
    assert versions.current.name == "2"


def test_the_session_asked_for_longest_ago_makes_room_and_no_connection_does():
    sessions, version = Sessions(3), Version("1", FakePolicy())
    sessions.get("a", version, connected=True)
    for name in ("b", "c", "b", "d"):
        sessions.get(name, version)
    assert list(sessions.open) == ["a", "b", "d"] and version.sessions == 3
    for name in ("b", "d"):
        sessions.open[name].connected = True
    with pytest.raises(ServeError, match=r"too many sessions.*close connections"):
        sessions.get("e", version)
    sessions.close("a")
    sessions.get("e", version)


def test_an_alarm_follows_the_value_of_one_task():
    """By control steps from the task's first look on; without them, or without an alarm, nothing is said of it."""
    course = Course(tuple(float(step) for step in range(10)), (1.0,) * 10, steps=4.0)
    alarm = Alarm({"": course}, failing=Scores(math.inf, 0.9), unsure=Scores(math.inf, 0.45))
    policy = Values([0.0, 1.0, 0.2, 0.3, 0.3, 5.0, 5.0])
    session, engine = Session("robot", Version("1", policy, alarm=alarm)), Engine(Limits())

    async def act() -> list[Reply]:
        steps = [("open", 10), ("open", 11), ("open", 12), ("open", 14), ("open", None), ("close", 15), ("close", 16)]
        return [await engine.ask(seen(prompt, step=step), session) for prompt, step in steps]

    replies = live(engine, act())
    states = ["on_course", "on_course", "unsure", "failing", None, "on_course", "on_course"]
    assert [reply.alarm for reply in replies] == states
    assert [reply.value is None for reply in replies] == [False] * 4 + [True] + [False] * 2  # told where it was needed
    page = engine.telemetry.page().decode()
    assert 'prts_alarms_total{state="failing",version="1"} 1.0' in page


class Values(TwoSteps):
    """Answers with the values that it was given, one after the other."""

    contract = CONTRACT

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def act(self, observation, instruction, seeds) -> np.ndarray:
        self.told = next(self.values)
        return np.zeros((len(instruction), 4, 2), np.float32)

    def value(self, observation, actions, instruction) -> np.ndarray:
        return np.full(len(instruction), self.told)


class Slow(FakePolicy):
    """Takes its time, or for ever; its process may be lost first. ready: as of a replica."""

    ready = True

    def __init__(self, delay_s: float = 0.0, lost: bool = False) -> None:
        super().__init__(delay_s=delay_s)
        self.lost, self.calls = lost, 0

    def act(self, observation, instruction, seeds) -> np.ndarray:
        self.calls += 1
        if self.lost:
            self.lost, self.ready = False, False
            raise ProcessLost("gone")
        return super().act(observation, instruction, seeds)


def test_what_a_lost_process_was_asked_is_answered_by_another():
    here, there = Slow(0.05), Slow(lost=True)
    version = Version("1", here, replicas=(there,))
    engine = Engine(Limits(), replicas=1)

    async def talk() -> list[Reply]:
        return await asyncio.gather(*(engine.ask(seen(), Session(str(i), version)) for i in range(4)))

    assert len(live(engine, talk())) == 4
    assert there.calls == 1  # not again, one by one, while it loads


def test_a_worker_waits_for_nobody_whom_another_one_answers():
    engine = Engine(Limits(gather_s=60.0), replicas=1)
    one, other = (Session(name, Version("1", FakePolicy())) for name in ("one", "other"))

    async def waits(under_way: set[int]) -> bool:
        engine._last.append((time.monotonic(), 200.0, {id(one), id(other)}))
        engine._asked, engine._busy_since = under_way, dict.fromkeys(range(len(under_way)), 0.0)
        engine._queue.append(_Request(seen(), one, 0, asyncio.get_running_loop().create_future(), 0.0))
        try:
            await asyncio.wait_for(engine._company(), 0.2)
        except TimeoutError:
            return True
        finally:
            engine._queue.clear()
        return False

    assert asyncio.run(waits(set())) is False  # a worker each
    assert asyncio.run(waits({id(other)})) is False  # the other one is being answered, and cannot come
    alone = Engine(Limits(gather_s=60.0))
    alone._last.append((time.monotonic(), 200.0, {id(one), id(other)}))
    engine = alone
    assert asyncio.run(waits(set())) is True


def test_a_new_versions_processes_load_while_others_answer():
    class Loading(FakePolicy):
        def act(self, observation, instruction, seeds) -> np.ndarray:
            assert go_on.wait(30)
            return super().act(observation, instruction, seeds)

    go_on = threading.Event()
    version, new = (
        Version("1", FakePolicy(), replicas=(FakePolicy(),)),
        Version("2", FakePolicy(), replicas=(Loading(),)),
    )
    engine = Engine(Limits(), replicas=1)

    async def talk() -> None:
        preparing = asyncio.create_task(engine.prepare(new))
        await asyncio.sleep(0.05)
        for number in range(4):  # both workers are free
            await asyncio.wait_for(engine.ask(seen(), Session(str(number), version)), 5)
        assert not preparing.done()
        go_on.set()
        await preparing

    live(engine, talk())


def test_a_policy_that_hangs_does_not_hold_up_the_end():
    policy = Held()
    engine = Engine(Limits())

    async def talk() -> None:
        serving = asyncio.create_task(engine.run())
        asked = asyncio.create_task(engine.ask(seen(), Session("one", Version("1", policy))))
        await asyncio.to_thread(policy.thinks.wait, 30)
        serving.cancel()
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        engine.close()
        assert engine.hangs

    try:
        asyncio.run(asyncio.wait_for(talk(), 30))
    finally:
        policy.go_on.set()
