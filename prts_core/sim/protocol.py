"""The messages between a runner and the worker process of a simulator: MessagePack frames, checked on both sides.

A frame is its length (4 bytes, big endian) and one MessagePack map in the array form of io/msgpack.py. A request is
a map with `kind` and exactly the fields of REQUESTS[kind]; build one with the function of that name. The reply has the
same `kind` and the fields of REPLIES[kind], or is {kind: "refused", error}: what was asked for is wrong, the worker
lives on. A worker that is at fault itself says nothing; it ends.

    handshake    -> protocol, family, pid
    build        -> {}             settings: the family's own; the environment is built, nothing is simulated
    reset        -> observation?, frame? (H, W, 3) uint8 for people, instruction
    step         -> rewards (K',), successes (K',), steps = K', observation?, frames (F, H, W, 3)?, expert (K', A)?
                    K' <= K: the chunk ends with its first success unless `ignore_success`
    observe      -> observation    {"observation.state": (S,) float32, "<camera key>": (H, W, 3) uint8, ...}
    state        -> state          (n,) float64
    demonstrate  -> one episode of the suite's scripted expert, see sim/expert_episode.py
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.io.errors import ServeError, SimulatorError
from prts_core.io.msgpack import Limits, pack, unpack
from prts_core.sim.suite import EpisodeKey, Perturbation

VERSION = 3
LENGTH = struct.Struct(">I")
MAX_ACTIONS = 4096
REQUEST_LIMITS = Limits(max_bytes=16 * 2**20)
REPLY_LIMITS = Limits(max_bytes=512 * 2**20)  # a whole demonstration with its pictures


@dataclass(frozen=True)
class Array:
    """A field that holds an array of `ndim` dimensions whose dtype is of one of `kinds` (numpy's letters)."""

    ndim: int
    kinds: str


OPTIONAL = type(None)
_FRAME = (Array(3, "u"), OPTIONAL)
_EPISODE: dict[str, Any] = {
    "suite": str,
    "task": str,
    "initial_state": int,
    "seed": int,
    "perturbation": dict,
}
REQUESTS: dict[str, dict[str, Any]] = {
    "handshake": {},
    "build": {"settings": dict},
    "reset": _EPISODE | {"observe": bool, "render": bool},
    "step": {"actions": Array(2, "f"), "observe": bool, "render": int, "ignore_success": bool, "expert": str},
    "observe": {},
    "state": {},
    "demonstrate": _EPISODE | {"noise": float, "noise_seed": int, "max_steps": int, "tail_steps": int, "images": bool},
}
REPLIES: dict[str, dict[str, Any]] = {
    "handshake": {"protocol": int, "family": str, "pid": int},
    "build": {},
    "reset": {"observation": (dict, OPTIONAL), "frame": _FRAME, "instruction": str},
    "step": {
        "rewards": Array(1, "f"),
        "successes": Array(1, "b"),
        "steps": int,
        "observation": (dict, OPTIONAL),
        "frames": (Array(4, "u"), OPTIONAL),
        "expert": (Array(2, "f"), OPTIONAL),
    },
    "observe": {"observation": dict},
    "state": {"state": Array(1, "f")},
    "demonstrate": {
        "actions": Array(2, "f"),
        "executed": Array(2, "f"),
        "proprio": Array(2, "f"),
        "states": Array(2, "f"),
        "images": dict,
        "phases": list,
        "rewards": Array(1, "f"),
        "success_row": (int, OPTIONAL),
        "instruction": str,
    },
    "refused": {"error": str},
}
# Requests that begin an episode of their own: a fresh worker can answer them, whatever came before.
BEGINS = ("reset", "demonstrate")

EXPERT = ("", "label", "act")  # of a step: not asked; asked, and not obeyed; it acts in the place of `actions`

Message = dict[str, Any]


def handshake() -> Message:
    return {"kind": "handshake"}


def build(settings: Mapping[str, Any]) -> Message:
    return {"kind": "build", "settings": dict(settings)}


def _episode(key: EpisodeKey, perturbation: Perturbation | None) -> Message:
    return {
        "suite": key.suite,
        "task": key.task,
        "initial_state": int(key.initial_state),
        "seed": int(key.seed),
        "perturbation": dict(perturbation or {}),
    }


def reset(
    key: EpisodeKey, *, perturbation: Perturbation | None = None, observe: bool = True, render: bool = False
) -> Message:
    """`perturbation` is laid over the task's own. `observe`: answer with an observation; `render`: with a picture."""
    return {"kind": "reset", **_episode(key, perturbation), "observe": observe, "render": render}


def step(
    actions: np.ndarray,
    *,
    observe: bool = True,
    render: int = 0,
    ignore_success: bool = False,
    expert: str = "",
) -> Message:
    """`actions`: (K, A) in the suite's convention. `observe`: after the last. `render`: a frame after every n-th
    step of the episode; 0: none. `expert`: of EXPERT; the reply says what the suite's scripted expert would do, or
    does, at each step."""
    return {
        "kind": "step",
        "actions": np.ascontiguousarray(actions, np.float32),
        "observe": observe,
        "render": int(render),
        "ignore_success": ignore_success,
        "expert": expert,
    }


def observe() -> Message:
    return {"kind": "observe"}


def state() -> Message:
    return {"kind": "state"}


def demonstrate(
    key: EpisodeKey,
    *,
    perturbation: Perturbation | None = None,
    noise: float = 0.0,
    noise_seed: int = 0,
    max_steps: int = 0,
    tail_steps: int = 0,
    images: bool = True,
) -> Message:
    """`noise`: of the pushes that shake the expert, drawn from `noise_seed`. `max_steps`: 0 for the task's own.
    `tail_steps`: rows recorded after success."""
    return {
        "kind": "demonstrate",
        **_episode(key, perturbation),
        "noise": float(noise),
        "noise_seed": int(noise_seed),
        "max_steps": int(max_steps),
        "tail_steps": int(tail_steps),
        "images": images,
    }


def frame(message: Message) -> bytes:
    """The bytes of one message on the socket."""
    data = pack(message)
    if len(data) > REPLY_LIMITS.max_bytes:
        raise SimulatorError(
            "A message to or from a simulator is too large",
            field=str(message.get("kind")),
            found=f"{len(data)} bytes",
            expected=f"at most {REPLY_LIMITS.max_bytes}",
            cure="ask for fewer steps, smaller pictures or none",
        )
    return LENGTH.pack(len(data)) + data


class FrameDecoder:
    """Bytes as they come in -> whole messages. `expected(message)` is called by whoever knows what should have come."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.buffer = limits, bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that `data` completes. SimulatorError for anything that is no frame of ours."""
        self.buffer += data
        found = []
        while len(self.buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self.buffer)
            if length > self.limits.max_bytes:
                raise SimulatorError(
                    "A simulator's socket carries no message of ours",
                    found=f"a frame of {length} bytes",
                    expected=f"at most {self.limits.max_bytes}",
                )
            if len(self.buffer) < LENGTH.size + length:
                break
            body = bytes(memoryview(self.buffer)[LENGTH.size : LENGTH.size + length])
            del self.buffer[: LENGTH.size + length]
            try:
                found.append(unpack(body, self.limits))
            except ServeError as err:
                raise SimulatorError("A simulator's socket carries no message of ours", found=str(err)) from err
        return found


def check(message: Any, table: Mapping[str, Mapping[str, Any]], *kinds: str) -> Message:
    """`message` where it is of one of `kinds` (none: of any in `table`) with exactly that kind's fields and types."""
    kind = message.get("kind") if isinstance(message, dict) else None
    allowed = kinds or tuple(table)
    if not isinstance(kind, str) or kind not in allowed:
        raise SimulatorError(
            "An unexpected message between runner and simulator",
            field="kind",
            found=f"{kind!r:.60}",
            expected=" or ".join(allowed),
        )
    fields = table[kind]
    if set(message) != {"kind", *fields}:
        raise SimulatorError(
            f"A {kind!r} message has the wrong fields",
            field=kind,
            found=", ".join(sorted(map(str, message))),
            expected=", ".join(sorted({"kind", *fields})),
        )
    for name, wanted in fields.items():
        if not any(_fits(message[name], one) for one in (wanted if isinstance(wanted, tuple) else (wanted,))):
            raise SimulatorError(
                f"A field of a {kind!r} message has the wrong type",
                field=f"{kind}.{name}",
                found=_told(message[name]),
                expected=str(wanted),
            )
    return message


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Array):
        return isinstance(value, np.ndarray) and value.ndim == wanted.ndim and value.dtype.kind in wanted.kinds
    return type(value) is wanted


def _told(value: Any) -> str:
    return f"array {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
