"""What a policy is shown: one mapping of named arrays, of one robot or a batch, checked and given a batch axis.

Widths and finiteness are the processor's to check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from prts_core.contract import Contract, PolicyContract
from prts_core.io.errors import DataError, suggest

STATE = "observation.state"


@dataclass(frozen=True)
class Answer:
    """actions (B, T, A) float32 in robot units; values (B,) in nats where asked for; subtask: B sentences that the
    policy said before it acted, where it did. Without a batch axis in, there is none in actions and values."""

    actions: np.ndarray
    values: np.ndarray | None = None
    subtask: list[str] | None = None


@dataclass(frozen=True)
class UnderWay:
    """What robots execute while the policy answers (real-time chunking).

    rows (B, T, A): of the chunk before, in robot units, the first to be executed next; where that chunk has ended, its
    last row held. delay (B,): rows that will have been executed when the answer arrives. executed (B,): rows of a chunk
    between two looks. Of a robot that stands still: delay 0, executed T.
    """

    rows: np.ndarray
    delay: np.ndarray
    executed: np.ndarray

    def repeated(self, times: int) -> UnderWay:
        """Every robot's row `times` times over, side by side."""
        return UnderWay(*(array.repeat(times, axis=0) for array in (self.rows, self.delay, self.executed)))


class Acts(Protocol):
    """What servers, benchmarks and rankings need of a policy (policy.policy.Policy). Arrays are in robot units."""

    @property
    def contract(self) -> PolicyContract: ...

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        """(B, H, W, 3) uint8 per camera, "observation.state" (B, D) float32, B sentences, B seeds -> actions
        (B, chunk, A) float32."""

    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: Sequence[str]
    ) -> np.ndarray:
        """How near these actions bring the robot to what the sentence asks: (B,)."""

    def act_and_value(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The actions of `act` and the value of them."""


class Answers(Protocol):
    """What a server needs of a policy: all of a request at once."""

    @property
    def contract(self) -> PolicyContract: ...

    @property
    def speaks(self) -> bool:
        """Whether it says its subtask before it acts."""

    def drift(self, state: np.ndarray) -> np.ndarray:
        """(B, D) states -> (B,): how far they lie outside what training saw; 0 inside."""

    def answer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        seeds: Sequence[int],
        subtask: Sequence[str] | None = None,
        value: bool = False,
        under_way: UnderWay | None = None,
        draws: int = 1,
    ) -> Answer:
        """policy.Policy.answer."""


@runtime_checkable
class Remembers(Protocol):
    """What a server needs of a policy that keeps something for each session, and may be away for a while."""

    @property
    def unready(self) -> str | None:
        """Why robots should not come now; none while they may."""

    @property
    def unwell(self) -> str | None:
        """Why it will not answer any more; none while it may."""

    def answer_in(
        self,
        sessions: Sequence[tuple[str, bool]] | None,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        seeds: Sequence[int],
        value: bool = False,
    ) -> Answer:
        """`Answers.answer` for samples of these sessions: (name, whether its task has only begun). It goes on from a
        chunk under way by what it remembers, or not at all."""


class TwoSteps:
    """`act_and_value` and `answer` of a policy in which action and value have nothing in common; one that cannot go on
    from a chunk under way gives a fresh one."""

    act: Any
    value: Any
    speaks = False

    def drift(self, state: np.ndarray) -> np.ndarray:
        return np.zeros(len(state))

    def act_and_value(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        actions = self.act(observation, instruction, seeds)
        return actions, self.value(observation, actions, instruction)

    def answer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        seeds: Sequence[int],
        subtask: Sequence[str] | None = None,
        value: bool = False,
        under_way: UnderWay | None = None,
        draws: int = 1,
    ) -> Answer:
        if value:
            return Answer(*self.act_and_value(observation, instruction, seeds))
        return Answer(self.act(observation, instruction, seeds))


@dataclass(frozen=True)
class ObservationBatch:
    """images: camera key -> (B, H, W, 3) uint8. state (B, D) float32. instructions: B sentences. single: came without
    a batch axis, and the answer goes without one."""

    images: dict[str, np.ndarray]
    state: np.ndarray
    instructions: list[str]
    single: bool

    def __len__(self) -> int:
        return len(self.state)

    def repeated(self, times: int) -> ObservationBatch:
        """Every sample `times` times over, side by side."""
        return ObservationBatch(
            {key: images.repeat(times, axis=0) for key, images in self.images.items()},
            self.state.repeat(times, axis=0),
            [text for text in self.instructions for _ in range(times)],
            False,
        )


def read_observation(
    observation: Mapping[str, np.ndarray], instruction: str | Sequence[str], contract: Contract
) -> ObservationBatch:
    """{"observation.state": (D,) or (B, D), camera key: (H, W, 3) or (B, H, W, 3) uint8} and a sentence, or one for
    each of the batch. Keys that the contract does not name are left alone.

    Raises DataError that names the key which is missing, of a wrong rank or dtype, or of another batch size.
    """
    wanted = [STATE, *(camera.key for camera in contract.cameras)]
    for key in wanted:
        if key not in observation:
            raise DataError(
                f"{'The state' if key == STATE else 'A camera'} is missing{suggest(key, observation)}",
                field=key,
                found=", ".join(sorted(observation)) or "nothing",
                expected=", ".join(wanted),
            )
    state = np.asarray(observation[STATE])
    if state.ndim not in (1, 2) or state.dtype.kind not in "fiu":
        raise DataError(
            "The state has the wrong form",
            field=STATE,
            found=f"{state.dtype} {state.shape}",
            expected="numbers (D,), or (B, D) for a batch",
        )
    single = state.ndim == 1
    state = np.atleast_2d(state).astype(np.float32, copy=False)
    images = {}
    for key in wanted[1:]:
        image = np.asarray(observation[key])
        if image.ndim != (3 if single else 4) or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise DataError(
                "A camera image has the wrong form",
                field=key,
                found=f"{image.dtype} {image.shape}",
                expected=f"uint8 {'(H, W, 3)' if single else '(B, H, W, 3)'}, as the state has "
                f"{'no batch axis' if single else 'a batch axis'}",
            )
        images[key] = image[None] if single else image
        if len(images[key]) != len(state):
            raise DataError(
                "An observation's parts disagree on the batch", field=key, found=len(images[key]), expected=len(state)
            )
    return ObservationBatch(images, state, sentences(instruction, len(state)), single)


def sentences(instruction: str | Sequence[str], count: int) -> list[str]:
    """One sentence for each of `count` samples: the one given, or as many as given."""
    found = [instruction] * count if isinstance(instruction, str) else list(instruction)
    if len(found) != count or not all(isinstance(text, str) for text in found):
        raise DataError(
            "There is not one instruction for each sample",
            field="instruction",
            found=found[:8],
            expected=f"a sentence, or {count} of them",
        )
    return found


def read_actions(actions: np.ndarray, batch: ObservationBatch) -> np.ndarray:
    """(T, A), or (B, T, A) for a batch -> (B, T, A) float32."""
    actions = np.asarray(actions)
    wanted = 2 if batch.single else 3
    if actions.ndim != wanted or (not batch.single and len(actions) != len(batch)):
        raise DataError(
            "Actions do not fit their observation",
            field="action",
            found=actions.shape,
            expected="(T, A)" if batch.single else f"({len(batch)}, T, A)",
        )
    return actions.reshape(len(batch), *actions.shape[-2:]).astype(np.float32, copy=False)


def read_seeds(seeds: int | Sequence[int], batch: ObservationBatch) -> list[int]:
    """One noise seed for each sample; for a single observation a plain integer will do."""
    found = [int(seeds)] if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
    if len(found) != len(batch):
        raise DataError("There is not one seed for each sample", field="seeds", found=found[:8], expected=len(batch))
    return found
