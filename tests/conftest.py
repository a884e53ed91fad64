"""Settings every test needs before anything heavy is imported, and one shared fixture file. It knows no room."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Early and shallow: pandera imports it wherever it is installed, and Python 3.11's parser gives up (SystemError: AST
# constructor recursion depth) where pytest rewrites it for the first time deep inside other imports.
import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads a model
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("MLFLOW_TRACKING_URI", None)  # a user's server must not receive test runs
for _name in ("PRTS_RECIPE", "PRTS_OUTPUTS"):  # nor their outputs folder
    os.environ.pop(_name, None)

# A shared, busy machine: examples of property tests have no deadline and are the same in every run.
hypothesis.settings.register_profile("prts", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("prts")

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
for _number in STOPS:  # a shell's background job ignores SIGINT, and so would every process that a test starts
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
HEARD = {number: signal.getsignal(number) for number in STOPS}

pytest_plugins = ["tests.fixtures.small_disk", "tests.fixtures.smoke_run", "tests.fixtures.tiny_network"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Beside others (`make test`), modules that may take longest begin first: none is left to run alone in the end."""
    if not hasattr(config, "workerinput"):
        return
    longest: dict[str, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = float(marker.args[0]) if marker else 300.0 if item.get_closest_marker("slow") else 0.0
        module = item.nodeid.partition("::")[0]
        longest[module] = max(longest.get(module, 0.0), seconds)
    items.sort(key=lambda item: -longest[item.nodeid.partition("::")[0]])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test leaves the handlers of signals as they were: whatever its process ignores, later tests' children ignore.

    Put back without a word: Dagster gives SIGTERM whatever handler SIGINT has, and leaves it so.
    """
    try:
        return (yield)
    finally:
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS) & set(STOPS)
        left = {number: found for number in HEARD if (found := signal.getsignal(number)) != HEARD[number]}
        for number in left:
            signal.signal(number, HEARD[number])
        if blocked or left.items() - {(signal.SIGTERM, HEARD[signal.SIGINT])}:
            said = ", ".join([f"{number.name} -> {handler}" for number, handler in left.items()] or ["blocked signals"])
            pytest.fail(f"{item.nodeid} has left handlers of signals behind: {said}", pytrace=False)
