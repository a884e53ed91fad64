"""Measure how long a policy takes for a chunk on this machine, warm, and hold that against its package's budget.

Times are kept beside results and on versions, never in a package: equal work has equal bytes.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prts_core.delivery import registry
from prts_core.delivery.verify import verify_package
from prts_core.io.files import canonical_json, digest_value
from prts_core.policy.observation import STATE
from prts_core.skills.manifest.resources import LatencyBudget
from prts_core.skills.rules import over_budget
from prts_core.tracking.store import client

if TYPE_CHECKING:
    import torch
    from mlflow.entities.model_registry import ModelVersion

    from prts_core.policy.policy import Policy

TAG = "prts.latency."
WARM_UP, REPEATS, LEAST, PATIENCE_S = 3, 50, 10, 20.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one chunk for one robot, over `repeats` calls after WARM_UP that were not counted. machine: its
    name; device: what of it computed; budget_ms: what the package allows."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    repeats: int
    machine: str
    device: str
    budget_ms: float

    @property
    def over(self) -> list[str]:
        """Where 95 of 100 chunks do not come within the budget, that in words."""
        return [*over_budget(LatencyBudget(self.budget_ms), per_chunk_ms=self.p95_ms)]


def example(policy: Policy) -> dict[str, np.ndarray]:
    """An observation that fits the policy's contract: noise for pictures, a state within the training data's range."""
    rng = np.random.default_rng(0)
    cameras, statistics = policy.contract.contract.cameras, policy.processor.statistics.state
    seen = {c.key: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in cameras}
    seen[STATE] = rng.uniform(statistics.q01, statistics.q99).astype(np.float32)
    return seen


def measure(policy: Policy, budget_ms: float, sentence: str = "pick up the cube") -> Latency:
    """Ask for REPEATS chunks, or for as many as PATIENCE_S allows but at least LEAST."""
    seen, took = example(policy), []
    begun = time.perf_counter()
    for number in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        policy.act(seen, sentence, 0)
        took.append((time.perf_counter() - start) * 1e3)
        if number + 1 >= WARM_UP + LEAST and time.perf_counter() - begun > PATIENCE_S:
            break
    warm = took[WARM_UP:]
    p50, p95, p99 = (round(float(np.percentile(warm, q)), 2) for q in (50, 95, 99))
    return Latency(p50, p95, p99, len(warm), platform.node(), f"{hardware(policy.device)}, {policy.dtype}", budget_ms)


def hardware(device: torch.device | None = None) -> str:
    """The name of a device of this machine, or of the one that policies are loaded onto; as `Latency.device` begins."""
    from prts_core.policy.policy import resolve_device

    where = resolve_device(device)
    if where.type == "cuda":
        import torch

        return torch.cuda.get_device_name(where)
    return platform.processor() or platform.machine()


# ---- of registered versions ------------------------------------------------------------------------------------------
def tags_of(provenance: dict[str, Any]) -> dict[str, str]:
    """The tag of a version whose package was measured when it was made, from that stage's provenance."""
    found = provenance.get("timing", {}).get("latency")
    return {} if found is None else _tag(Latency(**found))


def too_slow(outputs: Path, version: ModelVersion) -> str:
    """The machine on which a registered policy is slower than its budget, or "": this one, on the device that policies
    are loaded onto, measured now where nobody has before. Where there is no torch, and so nobody serves, what was
    measured on another device counts, of this machine if there is one.

    Raises CheckpointError for a damaged package.
    """
    known = [Latency(**json.loads(text)) for name, text in version.tags.items() if name.startswith(TAG)]
    here = [one for one in known if one.machine == platform.node()]
    if importlib.util.find_spec("torch") is None:
        measured = here or known
    else:
        device = hardware()  # by what is told, not by the tag's name: that was of the machine alone once
        measured = [one for one in here if one.device.rpartition(", ")[0] == device]
        measured = measured or [_measure_version(outputs, version)]
    return next((one.machine for one in measured if one.over), "")


def _measure_version(outputs: Path, version: ModelVersion) -> Latency:
    from prts_core.policy.policy import load_policy

    package = verify_package(registry.version_files(outputs, version, registry.PACKAGE))
    made = measure(load_policy(package.policy), package.budget_ms)
    for name, text in _tag(made).items():
        client(outputs).set_model_version_tag(version.name, version.version, name, text)
    return made


def _tag(measured: Latency) -> dict[str, str]:
    name = TAG + digest_value([measured.machine, measured.device])[7:15]
    return {name: canonical_json(asdict(measured))}
