"""Record what is served as LeRobot v2.1 episodes, a session an episode, in a thread that no request waits for.

FOLDER/steps holds sessions of clients that count their control steps, FOLDER/looks_5hz those of clients that do not and
ask about five times a second (served_episode.py says what a row is). Looks that the thread is too slow for are dropped
and counted, and their episode ends there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from prts_core.contract import PolicyContract
from prts_core.io.errors import ServeError, require
from prts_core.io.files import explain_os_errors
from prts_core.io.locks import take
from prts_core.serving.engine import Reply
from prts_core.serving.observations import Observation
from prts_core.serving.served_episode import Look, OpenEpisode
from prts_core.serving.sessions import Session
from prts_core.serving.telemetry import Telemetry

if TYPE_CHECKING:
    from prts_core.serving.served_dataset import ServedDataset

logger = logging.getLogger("prts.serve")

OPEN, LOCK, STEPS = ".open", ".lock", "steps"
HELD_BYTES = 256 * 2**20  # of looks that wait for the thread
QUIET_S = 60.0  # after which a session's episode is over; sessions of ZeroMQ have no other end
NICE = 10  # the thread gives way to the policy
CLOSE_S = 60.0  # which the last episodes may take when the server ends


@dataclass(frozen=True)
class RecordSettings:
    """folder: of the datasets. max_bytes: of all that is under it; recording stops there, and the oldest is kept."""

    folder: Path
    max_bytes: int = 20 * 10**9
    held_bytes: int = HELD_BYTES

    def __post_init__(self) -> None:
        if self.max_bytes <= 0:
            raise ServeError("Recording needs room", field="--record-max-gb", found=self.max_bytes, expected="above 0")
        require("av", "data")
        require("pyarrow", "data")


@dataclass
class _Waiting:
    """What the event loop hands to the thread: looks, ends of sessions (numbers), and at last none."""

    items: queue.SimpleQueue[Look | int | None] = field(default_factory=queue.SimpleQueue)
    bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size: int) -> int:
        with self.lock:
            self.bytes += size
            return self.bytes


class Recorder:
    """An Onlooker. It holds the folder for itself until it is closed."""

    def __init__(self, settings: RecordSettings, contract: PolicyContract, telemetry: Telemetry) -> None:
        self.settings, self.contract, self.telemetry = settings, contract, telemetry
        self.stopped: str | None = None  # why nothing is recorded any more
        self._waiting = _Waiting()
        self._known: dict[int, Session] = {}  # of the event loop: numbers stay theirs until they have ended
        self._holes: set[int] = set()  # of the event loop too: sessions whose latest look was dropped
        self._episodes: dict[int, OpenEpisode] = {}
        self._datasets: dict[str, ServedDataset] = {}
        with explain_os_errors(settings.folder):
            settings.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (settings.folder / LOCK).open("a")
            if not take(self._lock):
                self._lock.close()
                raise ServeError("Another server records there", file=settings.folder, cure="choose another --record")
            shutil.rmtree(settings.folder / OPEN, ignore_errors=True)  # of a server that was killed
            for there in sorted(settings.folder.glob("*/.records.jsonl")):
                self._dataset(there.parent.name, None)
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="prts-recorder", daemon=True)
        self._thread.start()

    # ---- on the event loop ------------------------------------------------------------------------------------------
    def looked(self, session: Session, observation: Observation, reply: Reply) -> None:
        if self.stopped:
            return
        number = id(session)
        self._known[number] = session
        told = (reply.version, session.version.digest, monotonic(), observation, reply.actions, reply.value)
        look = Look(number, session.name, *told, reply.alarm, after_hole=number in self._holes)
        if self._waiting.add(look.size) > self.settings.held_bytes:
            self._waiting.add(-look.size)
            self._holes.add(number)
            self.telemetry.recorded("dropped_looks")
            return
        self._holes.discard(number)
        self._waiting.items.put(look)

    def ended(self, session: Session) -> None:
        if self._known.pop(id(session), None) is not None:
            self._holes.discard(id(session))
            self._waiting.items.put(id(session))

    def close(self) -> None:
        """Write what is open, and let go of the folder."""
        self._waiting.items.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the last recorded episodes were not written in %g s", CLOSE_S)
        self._lock.close()

    # ---- in the recorder's thread -----------------------------------------------------------------------------------
    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system lets a thread give way
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            try:
                item = self._waiting.items.get(timeout=QUIET_S / 4)
            except queue.Empty:
                self._end_quiet_ones()
                self._finish()
                continue
            if item is None:
                for number in list(self._episodes):
                    self._end(number)
                self._finish()
                return
            if isinstance(item, Look):
                self._waiting.add(-item.size)
                self._take(item)
                self._end_quiet_ones()
            else:
                self._end(item)

    def _take(self, look: Look) -> None:
        if self.stopped:
            return
        try:
            there = self._episodes.get(look.session)
            if there is not None and not there.goes_on(look):
                self._end(look.session)
                there = None
            if there is None:
                self._number += 1
                folder = self.settings.folder / OPEN / f"{self._number}"
                self._episodes[look.session] = OpenEpisode(folder, self.contract, look)
            else:
                there.add(look)
            self.telemetry.recorded("looks")
            held: Iterable[ServedDataset | OpenEpisode] = (*self._datasets.values(), *self._episodes.values())
            if sum(one.size for one in held) > self.settings.max_bytes:
                self._stop(f"{self.settings.folder} holds {self.settings.max_bytes / 1e9:g} GB")
        except OSError as err:
            self._stop(f"{self.settings.folder}: {err}")
        except Exception:
            logger.exception("an episode could not be recorded")
            self._leave_out(look.session)

    def _end(self, number: int) -> None:
        episode = self._episodes.pop(number, None)
        if episode is None:
            return
        try:
            if (found := episode.close()) is not None:
                name = STEPS if episode.counted else f"looks_{episode.rate}hz"
                dataset = self._dataset(name, None if episode.counted else float(episode.rate))
                dataset.add(*found, episode.first)
                self.telemetry.recorded("episodes")
        except OSError as err:
            self._stop(f"{self.settings.folder}: {err}")
        except Exception:
            logger.exception("an episode could not be recorded")
            self._leave_out(number)
        finally:
            episode.remove()

    def _dataset(self, name: str, rate: float | None) -> ServedDataset:
        """The one of that name. rate: rows a second; none: what the name says, or the control rate."""
        from prts_core.serving.served_dataset import ServedDataset

        if name not in self._datasets:
            own = self.contract.contract
            if name != STEPS:
                own = replace(own, control_hz=rate or float(name.removeprefix("looks_").removesuffix("hz")))
            self._datasets[name] = ServedDataset(self.settings.folder / name, own)
        return self._datasets[name]

    def _finish(self) -> None:
        """Have the metadata tell of every episode."""
        try:
            for dataset in self._datasets.values():
                dataset.finish()
        except OSError as err:
            self._stop(f"{self.settings.folder}: {err}")
        except Exception:
            logger.exception("the metadata of recorded episodes could not be written")

    def _end_quiet_ones(self) -> None:
        now = monotonic()
        for number, episode in list(self._episodes.items()):
            if now - episode.last.at > QUIET_S:
                self._end(number)

    def _stop(self, why: str) -> None:
        """What is open is written, pictures as they are being smaller as videos; nothing after."""
        if self.stopped is None:
            self.stopped = why
            logger.warning("recording has stopped: %s; serving goes on", why)
            for number in list(self._episodes):
                self._end(number)
            self._finish()

    def _leave_out(self, number: int) -> None:
        self.telemetry.recorded("failed_episodes")
        if (episode := self._episodes.pop(number, None)) is not None:
            episode.remove()
