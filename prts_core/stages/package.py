"""Stage package: one folder with weights, contract, statistics, processor, rskill.yaml, eval/*.json, card.

The policy's files are those that were benchmarked, byte for byte (one digest over them), and reload to the same
actions. The form is that of skill packages (docs/how-to/skills.md).
"""

from __future__ import annotations

import logging
from dataclasses import asdict

import numpy as np

from prts_core.config.schema import PackageConfig
from prts_core.contract import PolicyContract
from prts_core.delivery.gate import policy_episodes
from prts_core.delivery.latency import example, measure
from prts_core.delivery.packaging import write_package
from prts_core.delivery.skill_manifest import Terms
from prts_core.delivery.suite_results import computed_in, digest_of
from prts_core.io.errors import StageError
from prts_core.io.files import read_json, write_json
from prts_core.io.threads import POLICY_THREADS, torch_threads
from prts_core.policy.policy import Policy, load_policy, policy_digest
from prts_core.stages.policies import policy_of
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.value.alarm import FILE as ALARM
from prts_core.value.alarm import read_alarm

logger = logging.getLogger("prts.package")
DESCRIPTION = "Vision-language-action policy with goal reachability, trained by PRTS on demonstrations of {embodiment}"
THEN = {"rl": ", then by reinforcement in simulation"}


def package(config: PackageConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    made = policy_of(inputs)
    source = made.folder(context.outputs)
    measured = inputs["benchmark"].folder(context.outputs)
    benchmark = read_json(measured / "report.json")
    value = read_json(inputs["value"].folder(context.outputs) / "report.json")
    digest = policy_digest(source)
    for who, said in (("benchmark", benchmark["policy_digest"]), ("value", value["policy_digest"])):
        if said != digest:
            raise StageError(
                f"Stage {who} measured another policy than the one being packaged",
                found=said,
                expected=digest,
                cure=f"run `prts {who}` again",
            )
    alarm = read_alarm(inputs["value"].folder(context.outputs))
    contract = PolicyContract.load(source / "policy_contract.json")
    sentences = tuple(row["instruction"] for row in benchmark["tasks"].values())
    terms = Terms(
        name=f"{config.owner}/{config.name}",
        licence=config.licence,
        description=DESCRIPTION.format(embodiment=contract.contract.embodiment) + THEN.get(made.kind, "") + ".",
        per_chunk_ms=config.latency_budget_ms,
        tasks=tuple(f"{benchmark['suite']}/{name}" for name in benchmark["tasks"]),
        sentences=sentences,
        dtype=computed_in(benchmark),
    )
    write_package(
        source,
        context.output,
        terms,
        benchmark=benchmark,
        episodes_digest=digest_of(policy_episodes(measured / "episodes.parquet")),
        value={k: v for k, v in value.items() if k != "curves"},
        reports={} if alarm is None else {ALARM: alarm.to_json()},
    )
    policy = load_policy(context.output)
    with torch_threads(POLICY_THREADS):
        require_equal_actions(load_policy(source), policy, sentences[0])
    latency = measure(policy, config.latency_budget_ms, sentences[0])
    for said in latency.over:
        logger.warning("%s on %s (%s), 95 of 100 chunks: %s", terms.name, latency.machine, latency.device, said)
    write_json(context.work / "timing.json", {"latency": asdict(latency)})
    return StageResult(
        {"success_rate": benchmark["success_rate"]},
        {"policy": contract.fingerprint},
        ("README.md", "rskill.yaml"),
    )


def require_equal_actions(left: Policy, right: Policy, sentence: str) -> None:
    """StageError unless both policies give the same actions and values on a fixed observation, to the bit."""
    seen = example(left)
    ours, theirs = left.act(seen, sentence, 0), right.act(seen, sentence, 0)
    same = np.array_equal(ours, theirs) and np.array_equal(
        left.value(seen, ours, sentence), right.value(seen, ours, sentence)
    )
    if not same:
        raise StageError(
            "A reloaded policy does not give the same actions", found=float(np.abs(ours - theirs).max()), expected=0.0
        )
