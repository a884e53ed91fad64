"""Keep a server there: a thread that opens it, sees it end, opens it again a few times, and ends it with us."""

from __future__ import annotations

import logging
import threading

from prts_core.io.errors import PrtsError
from prts_core.serving.sidecar.child import Launch, Running, open_server

logger = logging.getLogger("prts.serve")

MOST_RESTARTS = 3  # in a row, without an answer in between
PAUSE_S = 1.0  # before a server is opened again


class Sidecar:
    """One server, opened by `start` and ended by `close`.

    wrong: why it cannot be asked at present, in a sentence; none while it can. given_up: it is not started any more.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.wrong: str | None = "The policy's own server has not been started."
        self.restarts, self.given_up = 0, False
        self._closing, self._opened = threading.Event(), threading.Event()
        self._fault: BaseException | None = None
        # One thread for all of the server's life: the kernel ends the server with the thread that started it.
        self._thread = threading.Thread(target=self._run, name="prts-sidecar", daemon=True)

    @property
    def address(self) -> str:
        return self.launch.address

    def start(self) -> Sidecar:
        """Return once the server answers. Raises what `child.open_server` does, and leaves nothing behind then."""
        self._thread.start()
        try:
            self._opened.wait()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._fault is not None:
            self._thread.join()
            raise self._fault
        return self

    def answered(self) -> None:
        """The server has done what it is there for: restarts are counted from here."""
        self.restarts = 0

    def close(self) -> None:
        """End the server if it is ours. Returns when it is gone."""
        self._closing.set()
        self.wrong = "The server is about to end."
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Sidecar:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- in the thread --------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            running: Running | None = open_server(self.launch, self._closing.is_set)
        except BaseException as err:  # noqa: BLE001 - `start` raises it
            self._fault = err
            return
        finally:
            self._well()
            self._opened.set()
        while running is not None and not self._closing.wait(running.watch_s):
            if running.gone():
                running = self._again(running)
        if running is not None:
            running.close()

    def _again(self, lost: Running) -> Running | None:
        """Another server in the place of one that is gone; none where that does not work."""
        ending = lost.ending
        lost.close()
        while not self._closing.is_set():
            if self.restarts >= MOST_RESTARTS:
                self.given_up = True
                self._tell(
                    f"The policy's own server ended {self.restarts + 1} times without an answer in between and is not "
                    f"started again: {ending}. Its log: {self.launch.log}. Restart `prts serve` once that is mended."
                )
                return None
            self.restarts += 1
            self._tell(
                f"The policy's own server is gone and is being started again (attempt {self.restarts} of "
                f"{MOST_RESTARTS}): {ending}. Ask again in a while."
            )
            if self._closing.wait(PAUSE_S):
                break
            try:
                found = open_server(self.launch, self._closing.is_set)
            except (PrtsError, OSError) as err:
                ending = str(err).rstrip(".")
            else:
                self._well()
                logger.warning("the policy's own server answers again")
                return found
        return None

    def _well(self) -> None:
        if self._fault is None and not self._closing.is_set():
            self.wrong = None

    def _tell(self, wrong: str) -> None:
        self.wrong = wrong
        logger.error("%s", wrong)
