"""Answer robots by asking a sidecar: to the engine a policy like any other, with batches, limits and both protocols.

The server's numbers are those of the contract that the user states; nothing is converted, scaled or turned. It is asked
by GR00T's nested form, which knows keys and widths exactly, so that the servers' strict checks stay on.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.io.errors import ServeError
from prts_core.policy.observation import STATE, Answer, TwoSteps, UnderWay
from prts_core.robot.connection import ServerGone
from prts_core.robot.groot import GrootClient
from prts_core.serving.protocols.groot_modality import LANGUAGE_KEYS, Modality
from prts_core.serving.sidecar.contract import StatedContract, agree
from prts_core.serving.sidecar.supervisor import Sidecar

# The servers keep memory for every session name they ever heard and never let it go: these are all that they hear of.
SLOTS = 64
PING_S = 2.0


class SidecarPolicy(TwoSteps):
    """A server that `sidecar` keeps there, as an Answers that remembers sessions (policy.observation.Remembers).

    groups, aliases: as of `prts serve` (--groot-key, --camera). timeout_s: of one request. It says no value, draws its
    own noise whatever the seed, and does not know how far a state lies outside its training (drift 0).
    """

    def __init__(
        self,
        sidecar: Sidecar,
        stated: StatedContract,
        groups: Mapping[str, Sequence[str]] | None = None,
        aliases: dict[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.sidecar, self.timeout_s = sidecar, timeout_s
        self.dtype = sidecar.launch.server.quantization.replace("none", "the server's own type")
        self._client = GrootClient(sidecar.address, timeout_s=timeout_s, stop=lambda: sidecar.wrong is not None)
        self._asking = threading.Lock()
        self._silent = False  # the last request was not answered in time
        self._slots: OrderedDict[str, str] = OrderedDict()  # session -> what the server calls it, eldest first
        try:
            configs = self._client.get_modality_config()
            if "action" not in configs:
                raise ServeError("The server does not say which actions it gives", found=", ".join(configs))
            self.modality = Modality.of(stated.read(configs), groups, aliases)
            self._cameras = agree(self.modality, configs)
        except BaseException:
            self._client.close()
            raise
        language = configs["language"].modality_keys if "language" in configs else []
        self._language = language[0] if language else LANGUAGE_KEYS[0]

    @property
    def contract(self) -> PolicyContract:
        return self.modality.contract

    @property
    def unready(self) -> str | None:
        """Why robots should not come now; none while they may."""
        return self.sidecar.wrong

    @property
    def unwell(self) -> str | None:
        """Why its server is not started any more; none while it is there or may come back."""
        return self.sidecar.wrong if self.sidecar.given_up else None

    def act(
        self, observation: Mapping[str, np.ndarray], instruction: Sequence[str], seeds: Sequence[int]
    ) -> np.ndarray:
        return self._ask(observation, instruction, None)

    def value(
        self, observation: Mapping[str, np.ndarray], actions: np.ndarray, instruction: Sequence[str]
    ) -> np.ndarray:
        raise ServeError(
            f"{self.sidecar.launch.server.family.title} has no value",
            field="value",
            cure="ask without `value`, and serve without --value and --best-of",
        )

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
        return self.answer_in(None, observation, instruction, seeds, value)

    def answer_in(
        self,
        sessions: Sequence[tuple[str, bool]] | None,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        seeds: Sequence[int],
        value: bool = False,
    ) -> Answer:
        """The answer for samples that belong to `sessions`: (name, whether its task has only begun). ServeError for
        what the server cannot do, and while it is away."""
        if value:
            self.value(observation, np.zeros(0), instruction)
        return Answer(self._ask(observation, instruction, sessions))

    def close(self) -> None:
        """End the server and, once a request that is under way has seen that, the connection."""
        self.sidecar.close()
        with self._asking:
            self._client.close()

    # ---- one request ----------------------------------------------------------------------------------------------
    def _ask(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: Sequence[str],
        sessions: Sequence[tuple[str, bool]] | None,
    ) -> np.ndarray:
        asked = {
            "video": {key: observation[camera][:, None] for key, camera in self._cameras.items()},
            "state": {
                key: np.ascontiguousarray(observation[STATE][:, None, places], dtype=np.float32)
                for key, places in self.modality.state.items()
            },
            "language": {self._language: [[text] for text in instruction]},
        }
        with self._asking:
            return self._actions(self._asked(asked, self._options(sessions)), len(instruction))

    def _asked(self, asked: dict[str, Any], options: dict[str, Any] | None) -> dict[str, np.ndarray]:
        if wrong := self.sidecar.wrong:
            raise ServeError(wrong)
        try:
            if self._silent:  # it may still be at the request that was given up: the next one does not wait as long
                self._client.ping(PING_S)
            found, _ = self._client.get_action(asked, options)
        except ServerGone as err:
            if wrong := self.sidecar.wrong:
                raise ServeError(wrong) from err
            self._silent = True
            raise ServeError(
                "The policy's own server does not answer",
                found=str(err.found),
                expected=f"an answer within {self.timeout_s:g} s",
                cure=f"ask again; {self.sidecar.launch.log} says what it does",
            ) from err
        self._silent = False
        self.sidecar.answered()
        return found

    def _actions(self, found: Mapping[str, np.ndarray], batch: int) -> np.ndarray:
        """{key: (B, chunk, width)} -> (B, chunk, A) float32."""
        length, width = self.contract.chunk_length, len(self.contract.contract.action)
        actions = np.empty((batch, length, width), np.float32)
        for key, places in self.modality.action.items():
            part, expected = found.get(key), (batch, length, len(places))
            if part is None or part.shape != expected or part.dtype.kind not in "fiu":
                raise ServeError(
                    "The server's actions are not those of the contract",
                    field=f"action.{key}",
                    found="missing" if part is None else f"{part.dtype} {part.shape}",
                    expected=f"numbers {expected}",
                    cure="name another --contract, or other --groot-key",
                )
            actions[:, :, places] = part
        return actions

    def _options(self, sessions: Sequence[tuple[str, bool]] | None) -> dict[str, Any] | None:
        """RLDX-1's: a name for each session, and which of them forget what they hold."""
        if sessions is None or not self.sidecar.launch.server.family.remembers:
            return None
        names, fresh = [], []
        for session, begun in sessions:
            fresh.append(begun or session not in self._slots)
            if session not in self._slots:
                full = len(self._slots) >= SLOTS
                self._slots[session] = self._slots.popitem(last=False)[1] if full else f"prts-{len(self._slots)}"
            self._slots.move_to_end(session)
            names.append(self._slots[session])
        return {"session_ids": names, "reset_memory": fresh}
