"""Remember what a person wants to see of a server: sessions, their last pictures and chunks, times, errors.

Little is kept of each look and nothing is computed until somebody asks (`Watch.state`, then `finished` in a thread).
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core import __version__
from prts_core.serving.engine import Reply
from prts_core.serving.observations import Observation, short_name
from prts_core.serving.sessions import Session
from prts_core.value.alarm import State

if TYPE_CHECKING:
    from prts_core.serving.service import PolicyService

MOST_SHOWN = 16  # sessions that are remembered: those that were heard of last
MOST_VALUES, MOST_EXECUTED, MOST_TIMES, MOST_ERRORS = 240, 48, 256, 20
MOST_DIMENSIONS = 16  # of an action that are drawn
SIDE = 224  # pixels of a picture's longer side, at most
QUALITY = 70  # of a JPEG
PHASES = ("decode", "queue", "policy", "encode", "all")


@dataclass
class _Seen:
    """One session. who: its client, where that says more than the name. executed: rows that the robot has executed
    where its client counts its steps; else the first row of each chunk."""

    name: str
    who: str
    version: str
    began: float
    heard: float = 0.0
    looks: int = 0
    prompt: str = ""
    subtask: str | None = None
    step: int | None = None
    values: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MOST_VALUES))
    alarm: State | None = None
    chunk: np.ndarray | None = None
    held: int = 0
    executed: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=MOST_EXECUTED))
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Watch:
    """An Onlooker of one service."""

    def __init__(self, service: PolicyService) -> None:
        self.service, self.began = service, time.time()
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        self._times: dict[str, deque[float]] = {phase: deque(maxlen=MOST_TIMES) for phase in PHASES}
        self._who: dict[str, str] = {}
        self._errors: deque[dict[str, Any]] = deque(maxlen=MOST_ERRORS)

    def met(self, session: str, who: str) -> None:
        """Which client the session of that name is of; forgotten when it ends."""
        self._who[session] = who

    def looked(self, session: Session, observation: Observation, reply: Reply) -> None:
        now, who = time.time(), self._who.get(session.name, "")
        seen = self._seen.setdefault(id(session), _Seen(session.name, who, reply.version, now))
        self._seen.move_to_end(id(session))
        if len(self._seen) > MOST_SHOWN:
            self._seen.popitem(last=False)
        if seen.chunk is not None:
            counted = observation.step is not None and seen.step is not None
            since = (observation.step or 0) - (seen.step or 0) if counted else 1
            seen.executed.extend(seen.chunk[:since])
        seen.heard, seen.looks, seen.step = now, seen.looks + 1, observation.step
        seen.prompt, seen.subtask, seen.alarm = observation.prompt, reply.subtask, reply.alarm
        seen.chunk, seen.held = reply.actions[:, :MOST_DIMENSIONS], reply.held
        if reply.value is not None and math.isfinite(reply.value):
            seen.values.append((now, reply.value))
        seen.pictures = {key: smaller(picture) for key, picture in observation.images.items()}

    def ended(self, session: Session) -> None:
        self._seen.pop(id(session), None)
        if session.name not in self.service.sessions.open:  # else it has another task
            self._who.pop(session.name, None)

    def close(self) -> None:
        pass

    def took(self, phase: str, seconds: float) -> None:
        """A phase of an answer: decode, queue, policy, encode, or all of them."""
        self._times[phase].append(seconds)

    def failed(self, who: str, what: str) -> None:
        self._errors.appendleft({"at": time.time(), "who": who, "what": what[:600]})

    # ---- when somebody asks -----------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Everything, copied on the event loop; arrays are still arrays (`finished` makes JSON of it elsewhere)."""
        service, contract = self.service, self.service.contract
        return {
            "server": f"prts {__version__}",
            "model": str(service.config.about.get("model") or ""),
            "now": time.time(),
            "began": self.began,
            "unwell": service.unready,
            "protocols": list(service.config.protocols),
            "embodiment": contract.embodiment_tag,
            "control_hz": contract.contract.control_hz,
            "action": [dimension.name for dimension in contract.contract.action][:MOST_DIMENSIONS],
            "cameras": {camera.key: short_name(camera) for camera in contract.contract.cameras},
            "clients": service.clients,
            "max_clients": service.config.max_clients,
            "under_way": service.under_way,
            "queued_bytes": service.admission.queued,
            "budget_ms": service.config.budget_ms,
            "recording": service.recording,
            "versions": versions(service),
            "open_sessions": len(service.sessions.open),
            "times": {phase: list(spent) for phase, spent in self._times.items()},
            "sessions": [
                vars(seen) | {"values": list(seen.values), "executed": list(seen.executed)}
                for seen in self._seen.values()
            ],
            "errors": list(self._errors),
        }


def versions(service: PolicyService) -> list[dict[str, Any]]:
    """Those that are held, and what for."""
    held = service.versions
    roles = ((held.current, "serving"), (held.candidate, "trial"), (held.previous, "before"))
    found = []
    for version in held.held():
        role = next((name for one, name in roles if one is version), "draining")
        found.append(
            {
                "name": version.name,
                "digest": version.digest,
                "sessions": version.sessions,
                "role": role,
                "share": held.share if role == "trial" else None,
            }
        )
    return found


def finished(state: dict[str, Any]) -> str:
    """`Watch.state` as JSON: pictures as JPEG, times as quantiles."""
    state["latency"] = [_quantiles(phase, spent) for phase, spent in state.pop("times").items() if spent]
    for session in state["sessions"]:
        session["pictures"] = {key: jpeg(picture) for key, picture in session["pictures"].items()}
        session["chunk"] = rounded(() if session["chunk"] is None else session["chunk"])
        session["executed"] = rounded(session["executed"])
        session["values"] = [(round(at, 2), round(value, 3)) for at, value in session["values"]]
    return json.dumps(state, allow_nan=False)


def smaller(picture: np.ndarray) -> np.ndarray:
    """Every n-th pixel (H, W, 3) of a large picture, so that little is held of what a client has sent."""
    step = -(-max(picture.shape[:2]) // SIDE)
    return picture[::step, ::step].copy()


def jpeg(picture: np.ndarray) -> str:
    """A data URL."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def rounded(rows: Sequence[np.ndarray] | np.ndarray) -> list[list[float]]:
    return [[float(f"{number:.4g}") for number in row] for row in rows]


def _quantiles(phase: str, spent: list[float]) -> dict[str, Any]:
    middle, late = np.quantile(spent, [0.5, 0.95]) * 1e3
    return {"phase": phase, "last_ms": round(spent[-1] * 1e3, 2), "p50_ms": round(middle, 2), "p95_ms": round(late, 2)}
