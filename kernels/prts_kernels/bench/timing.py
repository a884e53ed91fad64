"""Time of calls on one device: contenders in turns, inputs rotated past the L2 cache, medians.

On CUDA it is the GPU's time, by events; a spin kernel ahead of each turn lets the host queue all calls of the turn, so
that no gap of the host is counted. The host's own time a call is given beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

Call = Callable[[], object]
CYCLES_A_SECOND = 2.0e9  # of torch.cuda._sleep; no data-centre GPU clocks higher, a slower clock only spins longer
LONGEST_LEAD_S = 1.0
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError, AttributeError)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call over `runs` calls; host_us: microseconds the host needs to start one call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int
    host_us: float

    def to_json(self) -> dict[str, float]:
        return {key: float(f"{value:.6g}") for key, value in asdict(self).items()}


@dataclass(frozen=True)
class TimingPlan:
    """How long to measure. each_ms: of calls a contender in all rounds; warmup: calls; pause_s: between turns."""

    each_ms: float = 40.0
    rounds: int = 5
    warmup: int = 3
    pause_s: float = 0.005
    most_s: float = 1.5  # of wall clock a contender, for one whose host or device is very slow

    def quick(self) -> TimingPlan:
        return replace(self, each_ms=self.each_ms / 4, rounds=2, warmup=2, most_s=1.0)


def measure(
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
    plan: TimingPlan,
    on_turn: Callable[[str], None] | None = None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings of the contenders that ran, and of the others the reason.

    calls: for each contender the same call on several sets of inputs (`sets_past_cache`), taken in turn.
    on_turn: told whose turn begins, so that whoever watches knows whom a hang or crash belongs to.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    tell = on_turn or (lambda name: None)
    times: dict[str, list[float]] = {}
    hosts: dict[str, float] = {}
    counts: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, each in calls.items():
        tell(name)
        try:
            for i in range(max(plan.warmup, len(each))):  # every set once: lazy copies and plans belong to the warmup
                each[i % len(each)]()
            clock.wait()
            probe, host_s = clock.turn(each, 2, 0.0)
            probe, host_s = clock.turn(each, 2, host_s * 2)
        except FAILURES as err:
            failed[name] = one_line(err)
            clock.wait()  # raises where the device itself is lost: that ends the process, in this contender's turn
            continue
        device_s = max(sorted(probe)[0] / 1e3, 1e-6)
        wanted = plan.each_ms / 1e3 / plan.rounds / device_s
        affordable = min(plan.most_s / plan.rounds / max(device_s, host_s), LONGEST_LEAD_S / 1.2 / host_s)
        counts[name] = max(1, min(math.ceil(wanted), int(affordable), 500))
        hosts[name], times[name] = host_s, []
    for _ in range(plan.rounds):
        for name in list(times):
            tell(name)
            time.sleep(plan.pause_s)
            try:
                seen, host_s = clock.turn(calls[name], counts[name], counts[name] * hosts[name])
            except FAILURES as err:
                failed[name] = one_line(err)
                clock.wait()
                del times[name]
                continue
            hosts[name] = min(hosts[name], host_s)
            times[name] += seen
    found = {}
    for name, seen in times.items():
        median, low, high = np.quantile(seen, (0.5, 0.2, 0.8)).tolist()
        found[name] = Timing(median, low, high, len(seen), hosts[name] * 1e6)
    return found, failed


def sets_past_cache(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of inputs so that going round them leaves nothing of a set in the last cache: twice its size."""
    if device.type != "cuda":
        return 2
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 * 2**20
    return max(2, math.ceil(2 * cache / max(bytes_a_set, 1)) + 1)


def captured(call: Call) -> Call:
    """The call as a CUDA graph: the device's work alone, for libraries whose host work would outlast any lead.

    The results of a replay lie where those of the capture lie. RuntimeError where the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # a library may load code while it is captured
        kept = call()
    torch.cuda.synchronize()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def one_line(err: BaseException) -> str:
    """`RuntimeError: what it says`, its first 300 characters on one line."""
    text = " ".join(str(err).split())
    return f"{type(err).__name__}: {text}"[:300]


class _CudaClock:
    def __init__(self, device: torch.device):
        self.device = device

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def turn(self, calls: Sequence[Call], count: int, lead_s: float) -> tuple[list[float], float]:
        """Milliseconds of `count` calls on the device, and the host's seconds a call."""
        starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(count)] for _ in range(2))
        self.wait()
        torch.cuda._sleep(int(min(lead_s * 1.2 + 1e-4, LONGEST_LEAD_S) * CYCLES_A_SECOND))
        begin = time.perf_counter()
        for i in range(count):
            starts[i].record()
            calls[i % len(calls)]()
            ends[i].record()
        host_s = (time.perf_counter() - begin) / count
        self.wait()
        return [a.elapsed_time(b) for a, b in zip(starts, ends, strict=True)], host_s


class _HostClock:
    def wait(self) -> None:
        pass

    def turn(self, calls: Sequence[Call], count: int, lead_s: float) -> tuple[list[float], float]:
        seen = []
        for i in range(count):
            begin = time.perf_counter()
            calls[i % len(calls)]()
            seen.append((time.perf_counter() - begin) * 1e3)
        return seen, sum(seen) / 1e3 / count
