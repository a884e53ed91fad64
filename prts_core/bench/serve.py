"""`prts bench serve`: what serving adds to a policy's own time, what batches bring, and what the server withstands.

The server is a process of its own, on loopback, with both protocols. The stand-in takes 20 ms a batch, whatever its
size, as a GPU does that is not full; openpi's server, which answers one request after the other, cannot answer more of
them than one each 20 ms.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from prts_core.bench.made_policy import make_policy
from prts_core.bench.report import Row
from prts_core.bench.serve_delay import delay_rows
from prts_core.bench.serve_harm import malformed
from prts_core.bench.serve_parts import QUICK, Size, ask_for, request, served, threads_of, timed
from prts_core.bench.serve_process import STAND_IN_S
from prts_core.config.model import ModelConfig, MotConfig
from prts_core.io.errors import PrtsError
from prts_core.policy.policy import Policy, load_policy
from prts_core.robot.openpi import PolicyClient
from prts_core.serving.observations import short_name
from prts_core.sim.suites import suite

TINY = ModelConfig(image_size=64, chunk_length=4, expert=MotConfig(noise_scale=0.0))  # configs/models/tiny.yaml
CLIENTS, SOAKING = 8, 16


def run(console: Console, policy: Path | None = None, quick: bool = False, soak_s: float = 120.0) -> list[Row]:
    """policy: a folder of one that fits Meta-World; none: an untrained one of configs/models/tiny.yaml, which delays
    are not measured with. soak_s: how long clients come and go."""
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as work:
        folder = policy
        if folder is None:
            folder = Path(work) / "policy"
            make_policy(folder, TINY, suite("metaworld"))
        rows = overhead(console, size, folder)
        if policy is not None:
            rows += delay_rows(console, size, folder, load_policy(folder).contract)
    rows += together(console, size) + malformed(console, size) + swaps(console, size)
    return rows + soak(console, soak_s)


# ---- what serving adds ----------------------------------------------------------------------------------------------
def overhead(console: Console, size: Size, folder: Path) -> list[Row]:
    """A client's time against that of the bare call on the same observation, in turns."""
    policy, rows = load_policy(folder), []
    asked = request(policy.contract)
    with served(policy=str(folder)) as server, PolicyClient(server.openpi) as client:
        calls: list[tuple[float, float]] = []
        for number in range(size.calls + 3):
            calls.append((timed(partial(client.infer, asked, seed=number)), timed(_bare(policy, asked, number))))
    ours, bare = np.array(calls[3:]).T * 1e3
    console.print(f"client {median(ours):.2f} ms, bare call {median(bare):.2f} ms (medians)", highlight=False)
    note = f"bare call p50 {median(bare):.2f}, p99 {np.quantile(bare, 0.99):.2f} ms; client's {median(ours):.2f}, "
    note += f"{np.quantile(ours, 0.99):.2f} ms; {size.calls} calls in turns"
    for quantile, bound in ((0.5, 1.0), (0.99, 5.0)):
        added = float(np.quantile(ours, quantile) - np.quantile(bare, quantile))
        rows.append(
            Row(f"one client: added to a bare call, p{quantile * 100:.0f}", added, bound, "ms", "lower", "<= 1.0", note)
        )
    return rows


def _bare(policy: Policy, asked: dict[str, Any], seed: int) -> Callable[[], object]:
    seen = {c.key: asked[f"observation/{short_name(c)}"] for c in policy.contract.contract.cameras}
    seen["observation.state"] = asked["observation/state"]
    return lambda: policy.answer(seen, asked["prompt"], seed)


# ---- several clients ------------------------------------------------------------------------------------------------
def together(console: Console, size: Size) -> list[Row]:
    """Eight clients that ask without a pause, against one call at a time; and against one client alone."""
    with served() as server:
        (alone,) = ask_for(server, 1, size.each)
        begin = time.perf_counter()
        all_of = ask_for(server, CLIENTS, size.each)
        rate = CLIENTS * size.each / (time.perf_counter() - begin)
    worst = float(np.quantile(np.concatenate(all_of), 0.99))
    one = float(np.quantile(alone, 0.99))
    console.print(f"{CLIENTS} clients: {rate:.0f} chunks/s", highlight=False)
    note = f"stand-in of {STAND_IN_S * 1e3:.0f} ms a batch; one call at a time gives {1 / STAND_IN_S:.0f} a second"
    return [
        Row(f"{CLIENTS} clients / one call at a time", rate, 1 / STAND_IN_S, "chunks/s", "higher", ">= 4", note),
        Row(f"p99 of a chunk, {CLIENTS} clients / one", worst * 1e3, one * 1e3, "ms", "lower", "<= 2", note),
    ]


# ---- while versions change, and for long ----------------------------------------------------------------------------
def swaps(console: Console, size: Size) -> list[Row]:
    """Requests that failed while a new version is offered twice a second and clients come again every 50 requests."""
    versions: set[str] = set()

    def one(number: int) -> int:
        failed, left = 0, size.swapped // CLIENTS
        while left > 0:
            try:
                with PolicyClient(server.openpi) as client:
                    assert client.contract is not None
                    asked = request(client.contract, number)
                    for _ in range(min(50, left)):
                        left -= 1
                        versions.add(str(client.infer(asked)["version"]))
            except PrtsError:
                failed += 1
        return failed

    with served(swap_s=0.5) as server:
        failed = sum(threads_of([partial(one, number) for number in range(CLIENTS)]))
    console.print(f"hot swap: {failed} of {size.swapped} failed over {len(versions)} versions", highlight=False)
    note = f"answers came from {len(versions)} versions; the peer is the number of requests"
    what = "hot swap: requests that failed / all"
    return [Row(what, failed, float(size.swapped), "requests", "lower", "<= 0.0", note)]


def soak(console: Console, seconds: float) -> list[Row]:
    """Memory and open files of the server while sixteen clients join and leave: the end against a tenth of the time."""
    until = time.monotonic() + seconds

    def one(number: int) -> int:
        draw, asked_in_all = random.Random(number), 0
        while time.monotonic() < until:
            with PolicyClient(server.openpi, wait_s=5) as client:
                assert client.contract is not None
                asked = request(client.contract, number)
                for _ in range(draw.randrange(1, 100)):
                    client.infer(asked)
                    asked_in_all += 1
                    time.sleep(draw.uniform(0, 0.05))
        return asked_in_all

    def look() -> tuple[float, int]:
        time.sleep(seconds / 10)
        early = server.memory_mb
        time.sleep(max(0.0, until - time.monotonic()))
        return early, server.files

    with served(max_batch=SOAKING) as server:
        files = server.files
        (early, _), *counts = threads_of([look, *[partial(one, number) for number in range(SOAKING)]])
        time.sleep(1.0)
        late, left = server.memory_mb, server.files
    console.print(f"soak: {early:.0f} -> {late:.0f} MB, {files} -> {left} files, {sum(counts)} requests")
    note = f"{seconds / 60:.1f} minutes, {SOAKING} clients that join and leave, {sum(counts)} requests"
    return [
        Row("soak: memory at the end / at a tenth", late, early, "MB", "lower", "<= 1.03", note),
        Row("soak: open files after / before", left, files, "files", "lower", "<= 1.0", note),
    ]
