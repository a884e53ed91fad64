"""The policy's own thread: requests of several clients are answered together, and the event loop never waits for them.

While one batch is computed the next requests gather; nothing waits for company.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from prts_core.io.errors import CheckpointError, ServeError
from prts_core.policy.observation import STATE, Acts
from prts_core.serving.observations import Observation

logger = logging.getLogger("prts.serve")


@dataclass(frozen=True)
class Reply:
    """actions (chunk, A) float32; the seed they were drawn with; the value where asked for; milliseconds spent."""

    actions: np.ndarray
    seed: int
    value: float | None
    queue_ms: float
    infer_ms: float


@dataclass
class _Request:
    observation: Observation
    seed: int
    future: asyncio.Future[Reply]
    asked_at: float


class DynamicBatcher:
    """Answers observations in batches of at most `max_batch`, one batch at a time, in one worker thread."""

    def __init__(self, policy: Acts, max_batch: int, always_value: bool = False) -> None:
        self.policy, self.max_batch, self.always_value = policy, max_batch, always_value
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="prts-policy")

    async def ask(self, observation: Observation) -> Reply:
        """Wait for the answer. Raises ServeError when the policy fails; a cancelled wait is not computed any more."""
        seed = secrets.randbits(31) if observation.seed is None else observation.seed
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Request(observation, seed, future, time.monotonic()))
        return await future

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [request for request in batch if not request.future.done()]
            if not batch:
                continue
            answers = await loop.run_in_executor(self._worker, self._answer_all, batch)
            for request, answer in zip(batch, answers, strict=True):
                if request.future.done():
                    continue
                if isinstance(answer, Reply):
                    request.future.set_result(answer)
                else:
                    request.future.set_exception(answer)

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def warm_up(self) -> float:
        """Ask for zeros before any client does: milliseconds of a second call. CheckpointError on bad output."""
        contract = self.policy.contract.contract
        images = {c.key: np.zeros((c.height, c.width, 3), np.uint8) for c in contract.cameras}
        blank = Observation(images, np.zeros(len(contract.state), np.float32), "warm up", 0, self.always_value)
        try:
            self._answer([blank], [0])
            return self._answer([blank], [0])[2]
        except ServeError as err:
            raise CheckpointError("The policy does not do what its contract says", found=str(err)) from err

    # ---- in the worker thread -------------------------------------------------------------------------------------
    def _answer_all(self, batch: list[_Request]) -> list[Reply | ServeError]:
        """One answer or one error for each request; a request that fails does not take the others with it."""
        started = time.monotonic()
        try:
            actions, values, infer_ms = self._answer([r.observation for r in batch], [r.seed for r in batch])
        except Exception as err:
            if not isinstance(err, ServeError):
                logger.exception("the policy failed on a batch of %d", len(batch))
                err = ServeError(
                    "The policy failed on this request",
                    found=type(err).__name__,
                    cure="the server's log has the details; send the request again or restart the server",
                )
            return [err] if len(batch) == 1 else [answer for one in batch for answer in self._answer_all([one])]
        return [
            Reply(actions[i], request.seed, values[i], (started - request.asked_at) * 1e3, infer_ms)
            for i, request in enumerate(batch)
        ]

    def _answer(
        self, observations: list[Observation], seeds: list[int]
    ) -> tuple[np.ndarray, list[float | None], float]:
        """actions (B, chunk, A), value or none for each row, milliseconds."""
        started = time.monotonic()
        contract = self.policy.contract
        seen = {c.key: np.stack([o.images[c.key] for o in observations]) for c in contract.contract.cameras}
        seen[STATE] = np.stack([o.state for o in observations])
        prompts = [o.prompt for o in observations]
        found: np.ndarray | None = None
        if self.always_value or any(o.value for o in observations):
            actions, found = self.policy.act_and_value(seen, prompts, seeds)
        else:
            actions = self.policy.act(seen, prompts, seeds)
        actions = np.asarray(actions, dtype=np.float32)
        expected = (len(observations), contract.chunk_length, len(contract.contract.action))
        if actions.shape != expected:
            raise ServeError("The policy returned actions of a wrong shape", found=actions.shape, expected=expected)
        if not np.isfinite(actions).all():
            raise ServeError(
                "The policy returned actions that are not finite; none are sent", expected="finite actions"
            )
        values: list[float | None] = [None] * len(observations)
        if found is not None:
            nats = np.asarray(found, dtype=np.float64).reshape(-1)
            values = [
                float(v) if o.value or self.always_value else None for v, o in zip(nats, observations, strict=True)
            ]
        return actions, values, (time.monotonic() - started) * 1e3
