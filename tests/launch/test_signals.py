"""Stop signals: at once where nothing is lost, noted where a checkpoint is to be written, and never left in place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

from prts_core.io.errors import Stopped
from prts_core.launch import signals
from prts_core.launch.signals import graceful, stop_on_signals, stop_when


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_work_without_grace_at_once(number: int) -> None:
    with pytest.raises(Stopped, match=rf"{signal.Signals(number).name}.*same command goes on"), stop_on_signals():
        send(number)
        raise AssertionError("the signal came too late")


def test_sigint_stays_a_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt, match="the same command") as caught, stop_on_signals():
        send(signal.SIGINT)
    assert type(caught.value) is KeyboardInterrupt


def test_nothing_that_handles_faults_swallows_a_stop() -> None:
    with pytest.raises(Stopped), stop_on_signals():
        try:
            send(signal.SIGTERM)
        except Exception:  # noqa: BLE001
            raise AssertionError("swallowed") from None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_meets_a_callback_whose_exceptions_python_swallows_is_not_lost(number: int) -> None:
    class Seen:
        pass

    def gone(_: object) -> None:
        send(number)
        sum(range(1000))  # here the handler raises, and nobody hears it
        raise AssertionError("the signal came too late")

    hook = sys.unraisablehook
    with pytest.raises((Stopped, KeyboardInterrupt)), stop_on_signals():
        seen = Seen()
        watched = weakref.ref(seen, gone)
        del seen
        assert watched() is None
        time.sleep(20)
        raise AssertionError("went on")
    assert sys.unraisablehook is hook


def test_graceful_work_is_asked_to_stop_and_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped, match="checkpoint 7"), stop_on_signals(), graceful() as stop:
        assert not stop()
        send(signal.SIGTERM)
        assert stop()
        raise Stopped("checkpoint 7")
    reached = False
    monkeypatch.setattr(signals, "SAME_REQUEST_S", 60.0)
    with pytest.raises(Stopped, match="SIGUSR1"), stop_on_signals(), graceful() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # a launcher's copy of the same request
        reached = True
        monkeypatch.setattr(signals, "SAME_REQUEST_S", 0.0)
        send(signal.SIGUSR1)
        raise AssertionError("went on")
    assert reached


def test_a_rank_that_stops_because_another_heard_first_ignores_its_own_copy_of_the_request() -> None:
    with pytest.raises(Stopped, match="checkpoint 7"), stop_on_signals():
        try:
            with graceful():
                raise Stopped("checkpoint 7")
        except Stopped:
            send(signal.SIGUSR1)
            raise


def test_sigint_ends_graceful_work_as_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt, match="checkpoint 7"), stop_on_signals(), graceful() as stop:
        send(signal.SIGINT)
        assert stop()
        raise Stopped("checkpoint 7")


def test_a_request_that_graceful_work_did_not_see_stops_after_it() -> None:
    done = False
    with pytest.raises(Stopped), stop_on_signals():
        with graceful():
            send(signal.SIGTERM)
            done = True
        raise AssertionError("went on")
    assert done


def test_handlers_come_back_and_a_second_block_is_none() -> None:
    before = [signal.getsignal(n) for n in signals.SIGNALS]
    with stop_on_signals():
        mine = signal.getsignal(signal.SIGTERM)
        with stop_on_signals():
            pass
        assert signal.getsignal(signal.SIGTERM) is mine
    assert [signal.getsignal(n) for n in signals.SIGNALS] == before
    with pytest.raises(Stopped), stop_on_signals():
        send(signal.SIGTERM)
    with graceful() as stop:
        assert not stop(), "an earlier block's request is no request of this one"


def test_outside_the_main_thread_it_does_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_forked_helper_can_still_be_terminated() -> None:
    with stop_on_signals(), graceful():
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        os.kill(child, signal.SIGUSR1)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_an_ignored_signal_stays_ignored() -> None:
    before, reached = signal.signal(signal.SIGINT, signal.SIG_IGN), False
    try:
        with stop_on_signals():
            send(signal.SIGINT)
            reached = True
        assert reached and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_is_a_signal(tmp_path: Path) -> None:
    with pytest.raises(Stopped), stop_on_signals():
        stop_when(tmp_path / "stop")
        (tmp_path / "stop").touch()
        time.sleep(60)
        raise AssertionError("nobody came")


def test_it_needs_nothing_heavy() -> None:
    code = "import sys, prts_core.launch.signals; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
