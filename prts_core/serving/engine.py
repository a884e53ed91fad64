"""The policy's own threads: requests of several clients are answered together, and the event loop never waits for them.

While one batch is computed the next requests gather. Robots that ask again as soon as they are answered would come
just too late for the next batch: those of the last two are waited for, a quarter of what a batch takes and never longer
than a bound. Requests of one version of the policy make a batch; versions take turns by whose request is eldest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from prts_core.io.errors import CheckpointError, ConfigError, ServeError
from prts_core.policy.observation import STATE, Answer, Answers, Remembers, UnderWay
from prts_core.serving.observations import Observation
from prts_core.serving.replicas import ProcessLost, Replica
from prts_core.serving.sessions import Session
from prts_core.serving.telemetry import Telemetry
from prts_core.serving.versions import Version
from prts_core.value.alarm import State

logger = logging.getLogger("prts.serve")


@dataclass(frozen=True)
class Limits:
    """max_batch: requests answered together. max_waiting: requests that wait at once; one more is told that the server
    is busy. always_value: the value is told with every reply. subtask_looks: chunks that a policy which reasons in
    subtasks makes with the same words. stuck_s: a batch that takes longer makes the server unwell. best_of: chunks that
    are drawn for every answer, of which the one of the highest value is given. gather_s: how long a request waits at
    most for others to be answered with."""

    max_batch: int = 8
    max_waiting: int = 256
    always_value: bool = False
    subtask_looks: int = 1
    stuck_s: float = 60.0
    best_of: int = 1
    gather_s: float = 0.01


@dataclass(frozen=True)
class Reply:
    """actions (chunk, A) float32; the seed they were drawn with; the value where asked for; the subtask that the policy
    is at, where it says any. version: of the policy. held: first rows that are of the chunk under way. milliseconds
    spent; batch: requests that were answered together; drift: how far its state lay outside what training saw; alarm:
    how the task goes, where the version brings an alarm and the client counts its control steps."""

    actions: np.ndarray
    seed: int
    value: float | None
    queue_ms: float
    infer_ms: float
    version: str = ""
    subtask: str | None = None
    held: int = 0
    batch: int = 1
    drift: float = 0.0
    alarm: State | None = None


@dataclass
class _Request:
    observation: Observation
    session: Session
    seed: int
    future: asyncio.Future[Reply]
    asked_at: float
    again: bool = False  # a process was lost over it


class Engine:
    """Answers observations in batches: one at a time by the policy, and one by each of `replicas`, in a thread each."""

    def __init__(self, limits: Limits, telemetry: Telemetry | None = None, replicas: int = 0) -> None:
        self.limits, self.telemetry = limits, telemetry or Telemetry()
        self._queue: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._workers = [ThreadPoolExecutor(1, thread_name_prefix=f"prts-policy-{at}") for at in range(1 + replicas)]
        self._busy_since: dict[int, float] = {}
        self._asked: set[int] = set()  # sessions (by id) whose answers are being computed
        self._last: deque[tuple[float, float, set[int]]] = deque(maxlen=2)  # batches: ended at, seconds, whose

    async def ask(self, observation: Observation, session: Session) -> Reply:
        """Wait for the answer. Raises ServeError when the policy fails or too many wait; a cancelled wait is not
        computed any more."""
        if len(self._queue) >= self.limits.max_waiting:
            self.telemetry.refused("busy")
            raise ServeError(
                "The server is busy",
                found=f"{len(self._queue)} requests wait",
                expected=f"fewer than {self.limits.max_waiting}",
                cure="ask again in a moment, with fewer clients, or serve on a faster device",
            )
        seed = secrets.randbits(31) if observation.seed is None else observation.seed
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._queue.append(_Request(observation, session, seed, future, time.monotonic()))
        self.telemetry.waiting(len(self._queue))
        self._arrived.set()
        return await future

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        async with asyncio.TaskGroup() as group:
            for at in range(len(self._workers)):
                group.create_task(self._work(at))

    async def _work(self, at: int) -> None:
        """Batch after batch by the policy (0) or one of its replicas."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            await self._company()
            batch = self._gather(at)
            if not batch:
                self._arrived.clear()
                continue
            begun = self._busy_since[at] = time.monotonic()
            whose = {id(request.session) for request in batch}
            self._asked |= whose
            # Where this wait is cancelled the worker goes on: it stays busy, and `close` does not wait for it.
            answers = await loop.run_in_executor(self._workers[at], self._answer_all, batch, at)
            del self._busy_since[at]
            self._asked -= whose
            self._arrived.set()  # for requests of those sessions, which another worker left alone
            ended = time.monotonic()
            if any(isinstance(answer, ProcessLost) for answer in answers) and not batch[0].again:
                self._queue.extendleft(replace(request, again=True) for request in reversed(batch))
                continue
            self._last.append((ended, ended - begun, whose))
            for request, answer in zip(batch, answers, strict=True):
                if request.future.done():
                    continue
                if isinstance(answer, Reply):
                    seen, session = request.observation, request.session
                    session.answered(seen, answer.actions, answer.subtask, self.limits.subtask_looks)
                    answer = replace(answer, alarm=session.saw(seen.prompt, seen.step, answer.value))
                    self.telemetry.answered(answer, time.monotonic() - request.asked_at)
                    request.future.set_result(answer)
                else:
                    self.telemetry.refused("failed")
                    request.future.set_exception(answer)

    async def _company(self) -> None:
        """Wait for those who were answered a moment ago, if they are more than those who ask now."""
        now = time.monotonic()
        recent = [(seconds, whose) for ended, seconds, whose in self._last if now - ended < 2 * seconds]
        if not recent:
            return
        wanted = self._share(len(set().union(*(whose for _, whose in recent)) - self._asked))
        until = now + min(self.limits.gather_s, recent[-1][0] / 4)
        while len(self._queue) < wanted and (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        self._arrived.set()

    def _serves(self, at: int, request: _Request) -> bool:
        """Whether the worker's process of that version has loaded."""
        return not at or getattr(request.session.version.replicas[at - 1], "ready", True)

    def _share(self, requests: int) -> int:
        """How many of so many a worker takes at once: it leaves some for the others that are idle."""
        idle = max(1, len(self._workers) - len(self._busy_since))
        return min(self.limits.max_batch, -(-requests // idle))

    def _gather(self, at: int) -> list[_Request]:
        """The next batch: the eldest request and those behind it of the same version, but one a session at a time."""
        batch: list[_Request] = []
        waits: deque[_Request] = deque()
        room = self._share(len(self._queue))
        while self._queue:
            request = self._queue.popleft()
            if request.future.done():
                continue
            alike = not batch or request.session.version is batch[0].session.version
            alone = all(request.session is not other.session for other in batch)
            alone = alone and id(request.session) not in self._asked and self._serves(at, request)
            (batch if alike and alone and len(batch) < room else waits).append(request)
        self._queue = waits
        self.telemetry.waiting(len(waits))
        return batch

    @property
    def stuck_s(self) -> float:
        """Seconds that the batch under way has taken beyond what is allowed; 0 while all is well."""
        since = min(self._busy_since.values(), default=None)
        return 0.0 if since is None else max(0.0, time.monotonic() - since - self.limits.stuck_s)

    @property
    def hangs(self) -> bool:
        """After `close`: a thread is still at work, and would keep the process from ending."""
        return bool(self._busy_since)

    def close(self) -> None:
        """Without waiting for a policy that hangs, whose thread goes on (`hangs`)."""
        for at, worker in enumerate(self._workers):
            worker.shutdown(wait=at not in self._busy_since, cancel_futures=True)

    async def prepare(self, version: Version) -> float:
        """`warm_up`: of the version's other processes while all others work; of its policy here in the policy's thread,
        between two batches, which wait for it."""
        others = await asyncio.to_thread(warm_up, version, version.replicas, self.limits)
        own = (version.policy,)
        loop = asyncio.get_running_loop()
        return max(others, await loop.run_in_executor(self._workers[0], warm_up, version, own, self.limits))

    # ---- in the policy's thread, or a replica's -------------------------------------------------------------------
    def _answer_all(self, batch: list[_Request], at: int) -> list[Reply | ServeError]:
        """One answer or one error for each request; a request that fails does not take the others with it."""
        started = time.monotonic()
        try:
            version = batch[0].session.version
            policy = version.replicas[at - 1] if at else version.policy
            found, held = answer(policy, batch, self.limits)
            drifts = [float(drift) for drift in policy.drift(np.stack([r.observation.state for r in batch]))]
        except Exception as err:
            if isinstance(err, ProcessLost):
                return [err] * len(batch)
            if isinstance(err, ConfigError):
                err = ServeError(str(err))
            elif not isinstance(err, ServeError):
                logger.exception("the policy failed on a batch of %d", len(batch))
                err = ServeError(
                    "The policy failed on this request",
                    found=type(err).__name__,
                    cure="the server's log has the details; send the request again or restart the server",
                )
            return [err] if len(batch) == 1 else [one for request in batch for one in self._answer_all([request], at)]
        infer_ms = (time.monotonic() - started) * 1e3
        return [
            Reply(
                found.actions[i],
                request.seed,
                None if found.values is None or not wants_value(request, self.limits) else float(found.values[i]),
                (started - request.asked_at) * 1e3,
                infer_ms,
                request.session.version.name,
                None if found.subtask is None else found.subtask[i],
                held[i],
                len(batch),
                drifts[i],
            )
            for i, request in enumerate(batch)
        ]


def wants_value(request: _Request, limits: Limits) -> bool:
    """Whether the value is told: where it was asked for, and where an alarm or the choice of a chunk needs it."""
    asked = limits.always_value or request.observation.value or limits.best_of > 1
    return asked or (request.session.has_alarm and request.observation.step is not None)


def answer(policy: Answers, batch: list[_Request], limits: Limits) -> tuple[Answer, list[int]]:
    """(what the policy says, rows of each chunk that are of the one before); ServeError for what it must not say."""
    contract = policy.contract
    seen = {c.key: np.stack([r.observation.images[c.key] for r in batch]) for c in contract.contract.cameras}
    seen[STATE] = np.stack([r.observation.state for r in batch])
    value = any(wants_value(request, limits) for request in batch)
    under_way, delays = _under_way(contract.chunk_length, len(contract.contract.action), batch)
    found = _spoken(policy, seen, batch, value, under_way, limits.best_of)
    actions = np.asarray(found.actions, dtype=np.float32)
    expected = (len(batch), contract.chunk_length, len(contract.contract.action))
    if actions.shape != expected:
        raise ServeError("The policy returned actions of a wrong shape", found=actions.shape, expected=expected)
    if not np.isfinite(actions).all():
        raise ServeError("The policy returned actions that are not finite; none are sent", expected="finite actions")
    # A policy that cannot go on from a chunk gives a fresh one, and its robot is not told otherwise.
    held = [
        delay if under_way is not None and np.array_equal(own[:delay], under_way.rows[at, :delay]) else 0
        for at, (own, delay) in enumerate(zip(actions, delays, strict=True))
    ]
    return Answer(actions, found.values, found.subtask), held


def _under_way(length: int, width: int, batch: list[_Request]) -> tuple[UnderWay | None, list[int]]:
    """What robots execute meanwhile, of those that asked to go on from it, and how many rows each is held to."""
    rows, delays, executed = [], [], []
    for request in batch:
        left = request.session.left(request.observation.step, request.observation.delay, length)
        rows.append(np.zeros((length, width), np.float32) if left is None else left[0])
        delays.append(0 if left is None else request.observation.delay or 0)
        executed.append(length if left is None else left[1])
    if all(own == length for own in executed):
        return None, delays
    return UnderWay(np.stack(rows), np.array(delays), np.array(executed)), delays


def _spoken(
    policy: Answers,
    seen: dict[str, np.ndarray],
    batch: list[_Request],
    value: bool,
    under_way: UnderWay | None,
    draws: int,
) -> Answer:
    """The answer of a policy, with the words of every request where it reasons in subtasks: those that its session
    keeps, or new ones."""
    prompts, seeds = [r.observation.prompt for r in batch], [r.seed for r in batch]
    if isinstance(policy, Remembers):
        sessions = [(r.session.name, r.session.chunk is None) for r in batch]
        return policy.answer_in(sessions, seen, prompts, seeds, value)
    if not policy.speaks:
        return policy.answer(seen, prompts, seeds, value=value, under_way=under_way, draws=draws)
    kept = [r.session.words_for(r.observation.prompt) for r in batch]
    silent = [i for i, words in enumerate(kept) if words is not None]
    said = [words or "" for words in kept]
    parts: list[tuple[list[int], Answer]] = []
    for rows in (silent, [i for i in range(len(batch)) if i not in silent]):
        if not rows:
            continue
        words = [said[i] for i in rows] if rows is silent else None
        part = None
        if under_way is not None:
            part = UnderWay(under_way.rows[rows], under_way.delay[rows], under_way.executed[rows])
        some = {key: array[rows] for key, array in seen.items()}
        found = policy.answer(some, [prompts[i] for i in rows], [seeds[i] for i in rows], words, value, part, draws)
        for i, own in zip(rows, found.subtask or (), strict=False):
            said[i] = own
        parts.append((rows, found))
    order = np.argsort([i for rows, _ in parts for i in rows])
    values = [found.values for _, found in parts if found.values is not None]
    actions = np.concatenate([found.actions for _, found in parts])[order]
    return Answer(actions, np.concatenate(values)[order] if values else None, said)


def warm_up(version: Version, policies: Sequence[Answers], limits: Limits) -> float:
    """Ask some of a version's policies for zeros before any client does: milliseconds of a second call, of the slowest.
    CheckpointError on bad output, ProcessLost where one cannot load."""
    contract = version.policy.contract
    images = {c.key: np.zeros((c.height, c.width, 3), np.uint8) for c in contract.contract.cameras}
    state = np.zeros(len(contract.contract.state), np.float32)
    blank = Observation(images, state, "warm up", 0, limits.always_value)
    loop = asyncio.new_event_loop()
    slowest = 0.0
    try:
        for policy in policies:
            if isinstance(policy, Replica):
                policy.wait()
            for _ in range(2):
                request = _Request(blank, Session("warm up", version), 0, loop.create_future(), 0.0)
                started = time.monotonic()
                answer(policy, [request], limits)
                policy.drift(state[None])
            slowest = max(slowest, (time.monotonic() - started) * 1e3)
        return slowest
    except ProcessLost:
        raise
    except ServeError as err:
        raise CheckpointError("The policy does not do what its contract says", found=str(err)) from err
    finally:
        loop.close()
