"""Jobs for test_bench_parts.py, run in processes of their own."""

from __future__ import annotations

import os
import signal
import time


def talk(arguments, emit) -> None:
    for word in arguments["words"]:
        emit({"word": word})


def crash(arguments, emit) -> None:
    emit({"word": "before"})
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(arguments, emit) -> None:
    print("said before")
    raise ValueError("this is why\nand advice\nand more advice")


def hang(arguments, emit) -> None:
    emit({"word": "before"})
    time.sleep(60)
