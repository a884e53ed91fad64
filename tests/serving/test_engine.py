"""One engine, several versions and sessions: who is answered by what, from which chunk, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from prts_core.contract import PolicyContract
from prts_core.io.errors import ContractError, ServeError
from prts_core.policy.observation import STATE, Answer, UnderWay
from prts_core.serving.engine import Engine, Limits, Reply
from prts_core.serving.observations import Observation
from prts_core.serving.sessions import Session, Sessions
from prts_core.serving.versions import Version, Versions
from tests.serving.fake_policy import CONTRACT, FakePolicy


@dataclass
class Speaks:
    """Says a subtask before it acts; the chunk is the number of its words, or goes on from what is under way."""

    contract: PolicyContract = CONTRACT
    speaks: bool = True
    spoken: int = 0

    def drift(self, state: np.ndarray) -> np.ndarray:
        return np.full(len(state), 2.0)

    met: list[UnderWay | None] = field(default_factory=list)

    def answer(self, observation, instruction, seeds, subtask=None, value=False, under_way=None) -> Answer:
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
        one.reset()
        told.append([(await engine.ask(seen(seed=1), one)).subtask])
        return told

    told = live(engine, talk())
    assert told[0] == told[1] and told[0][0] != told[0][1]  # the same prompt, two robots
    assert set(told[2]).isdisjoint(told[0]) and told[3][0] not in told[2]


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
    session.reset()
    session.told(0)


def test_a_delay_that_no_chunk_can_bridge_is_the_clients_error():
    class Strict(Speaks):
        def answer(self, *asked, under_way=None, **more) -> Answer:
            from prts_core.models.heads.flow.realtime import require_fits

            if under_way is not None:
                require_fits(int(under_way.delay[0]), int(under_way.executed[0]), 4)
            return super().answer(*asked, under_way=under_way, **more)

    session, engine = Session("robot", Version("1", Strict(speaks=False))), Engine(Limits())

    async def act() -> None:
        session.told(0)
        await engine.ask(seen(step=0), session)
        session.told(1)
        with pytest.raises(ServeError, match="too short for real-time chunking"):
            await engine.ask(seen(step=1, delay=2), session)

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
    assert versions.roll_back() is second and versions.candidate is None
    assert versions.roll_back() is first
    with pytest.raises(ServeError, match="no version to fall back to"):
        versions.roll_back()
    assert set(versions.held()) == {first, second}  # a session holds it
    sessions.close("new")
    sessions.close("old")
    assert versions.held() == [first] and old.version is first


def test_a_version_that_means_other_numbers_is_not_offered():
    versions = Versions(Version("1", FakePolicy()))
    wider = replace(CONTRACT.contract, control_hz=5.0)
    with pytest.raises(ContractError, match="control_hz"):
        versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, contract=wider))))
    with pytest.raises(ContractError, match="chunks of another length"):
        versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, chunk_length=8))))
    versions.offer(Version("2", FakePolicy(contract=replace(CONTRACT, statistics_digest="sha256:01"))))
    assert versions.current.name == "2"


def test_sessions_that_say_nothing_for_long_make_room(monkeypatch: pytest.MonkeyPatch):
    sessions, version = Sessions(2), Version("1", FakePolicy())
    sessions.get("a", version)
    sessions.get("b", version)
    with pytest.raises(ServeError, match="too many sessions"):
        sessions.get("c", version)
    sessions.open["a"].last -= 3600
    sessions.get("c", version)
    assert list(sessions.open) == ["b", "c"] and version.sessions == 2
