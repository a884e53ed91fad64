"""Stage package: one folder with weights, contract, statistics, processor, manifest and model card.

The policy's files are those that were benchmarked, byte for byte (one digest over them), and reload to the same
actions.
"""

from __future__ import annotations

import time

import numpy as np

from prts_core import __version__
from prts_core.config.schema import PackageConfig
from prts_core.delivery.model_card import card
from prts_core.delivery.package_manifest import Evaluation, LatencyBudget, PackageManifest
from prts_core.io.errors import StageError
from prts_core.io.files import digest_file, link_or_copy, read_json, write_json, write_text
from prts_core.io.threads import POLICY_THREADS, torch_threads
from prts_core.policy.observation import STATE
from prts_core.policy.policy import Policy, load_policy, policy_digest, policy_files
from prts_core.stages.policies import policy_of
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult

RECORDS = ("train_config.json", "benchmark.json", "value.json")
DESCRIPTION = "Vision-language-action policy with goal reachability, trained by PRTS on demonstrations of {embodiment}"
THEN = {"rl": ", then by reinforcement in simulation"}
PROTOCOL = (
    "held-out episodes; the simulator's own success flag at any step within the task's limit; "
    "the policy sees images, sentence and proprioception only"
)


def package(config: PackageConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    made = policy_of(inputs)
    source = made.folder(context.outputs)
    benchmark = read_json(inputs["benchmark"].folder(context.outputs) / "report.json")
    value = read_json(inputs["value"].folder(context.outputs) / "report.json")
    for name in (*policy_files(source), "train_config.json"):
        (context.output / name).unlink(missing_ok=True)
        link_or_copy(source / name, context.output / name)
    digest = policy_digest(context.output)
    for who, measured in (("benchmark", benchmark["policy_digest"]), ("value", value["policy_digest"])):
        if measured != digest:
            raise StageError(
                f"Stage {who} measured another policy than the one being packaged",
                found=measured,
                expected=digest,
                cure=f"run `prts {who}` again",
            )
    policy = load_policy(context.output)
    sentence = next(iter(benchmark["tasks"].values()))["instruction"]
    with torch_threads(POLICY_THREADS):
        latency = require_equal_actions(load_policy(source), policy, sentence)
    write_json(context.work / "timing.json", {"chunk_ms": round(latency, 1), "budget_ms": config.latency_budget_ms})
    report = {k: v for k, v in benchmark.items() if k != "policy_digest"}
    write_json(context.output / "benchmark.json", benchmark)
    write_json(context.output / "value.json", {k: v for k, v in value.items() if k != "curves"})
    contract = policy.contract
    manifest = PackageManifest(
        name=config.name,
        version=__version__,
        licence=config.licence,
        description=DESCRIPTION.format(embodiment=contract.contract.embodiment) + THEN.get(made.kind, "") + ".",
        embodiment_tags=(contract.embodiment_tag,),
        capabilities=("act", "value", *(("subtask",) if policy.processor.subtasks else ())),
        chunk_size=contract.chunk_length,
        n_action_steps=max(1, contract.chunk_length // 2),
        latency_budget=LatencyBudget(per_chunk_ms=config.latency_budget_ms),
        contract_fingerprint=contract.contract_fingerprint,
        policy_digest=digest,
        files={name: digest_file(context.output / name) for name in (*policy_files(context.output), *RECORDS)},
        evaluations=(
            Evaluation(
                suite=report["suite"],
                protocol=PROTOCOL,
                success_rate=report["success_rate"],
                episodes=sum(row["n"] for row in report["tasks"].values()),
                results=report,
            ),
        ),
    )
    manifest.save(context.output)
    write_text(context.output / "README.md", card(manifest, contract, benchmark, value))
    return StageResult(
        {"success_rate": report["success_rate"]},
        {"policy": contract.fingerprint},
        ("README.md", "manifest.yaml"),
    )


def require_equal_actions(left: Policy, right: Policy, sentence: str) -> float:
    """Both policies give the same actions and values on a fixed observation, to the bit; returns the milliseconds of
    a chunk, once warm."""
    rng = np.random.default_rng(0)
    meant = left.contract.contract
    seen = {c.key: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in meant.cameras}
    statistics = left.processor.statistics.state
    seen[STATE] = rng.uniform(statistics.q01, statistics.q99).astype(np.float32)
    ours, theirs = left.act(seen, sentence, 0), right.act(seen, sentence, 0)
    begin = time.perf_counter()
    right.act(seen, sentence, 0)
    elapsed = (time.perf_counter() - begin) * 1e3
    same = np.array_equal(ours, theirs) and np.array_equal(
        left.value(seen, ours, sentence), right.value(seen, ours, sentence)
    )
    if not same:
        raise StageError(
            "A reloaded policy does not give the same actions", found=float(np.abs(ours - theirs).max()), expected=0.0
        )
    return elapsed
