"""Stage benchmark: the recipe's policy and its controls in closed loop on a simulation suite."""

from __future__ import annotations

from prts_core.config.schema import BenchmarkConfig
from prts_core.policy.policy import resolve_dtype
from prts_core.rollout.benchmark import BenchmarkFolders, benchmark_policy
from prts_core.stages.policies import policy_of
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult


def benchmark(config: BenchmarkConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    policy = policy_of(inputs)
    early = inputs["sft"].folder(context.outputs) / "early" if "sft" in inputs else None
    report = benchmark_policy(
        config,
        BenchmarkFolders(
            policy=policy.folder(context.outputs),
            dataset=inputs["convert"].folder(context.outputs),
            early=early if early is not None and early.exists() else None,
            # A run that another machine goes on with, in another precision, is another run.
            work=context.work / f"conditions-{resolve_dtype(config.dtype)}",
            output=context.output,
            timing=context.work / "timing.json",
        ),
    )
    metrics = {k: v for k, v in report.items() if isinstance(v, float)}
    metrics |= {f"success/{name}": row["successes"] / row["n"] for name, row in report["tasks"].items()}
    videos = tuple(sorted(p.relative_to(context.output).as_posix() for p in context.output.glob("videos/*.mp4")))
    return StageResult(metrics, dict(policy.contracts), ("report.json", "episodes.parquet", "page.html", *videos))
