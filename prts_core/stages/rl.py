"""Stage rl: the policy improves by what it earns in the simulator; the output is a policy folder."""

from __future__ import annotations

from pathlib import Path

from prts_core.config.checked_yaml import expand
from prts_core.config.identity import identity
from prts_core.config.rl import RlConfig
from prts_core.delivery.resolve import policy_folder
from prts_core.io.files import write_json
from prts_core.launch.signals import graceful
from prts_core.policy.policy import load_policy, policy_digest, save_policy
from prts_core.rl.page import write_page
from prts_core.rl.report import report, write_curve
from prts_core.rl.run import Run
from prts_core.rollout.benchmark import suite_and_tasks
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult


def rl(config: RlConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    policy = load_policy(start_folder(config, inputs, context), "fp32")
    suite, tasks, size, made = suite_and_tasks(config)
    settings = config.replaced(tasks=tasks, image_size=size)
    run = Run(policy, suite, made, settings, context.seed, context.work, context.log)
    with graceful() as stop:
        found = run.run(stop)
    save_policy(context.output, found.weights, policy.model.config, policy.processor)
    write_json(context.output / "train_config.json", identity(config))
    told = report(config, found)
    write_json(context.output / "report.json", told | {"policy_digest": policy_digest(context.output)})
    write_curve(context.output, found.rows)
    write_page(context.output / "page.html", config, found)
    figures = {"success_rate": told["after"]["rate"], "success_rate_before": told["before"]["rate"]}
    return StageResult(figures, {"policy": policy.contract.fingerprint}, ("page.html", "training.csv", "report.json"))


def start_folder(config: RlConfig, inputs: dict[str, Manifest], context: StageContext) -> Path:
    """Where the policy lies that the run begins with."""
    if config.checkpoint is None:
        return inputs[config.start].folder(context.outputs)
    return policy_folder(expand(config.checkpoint, "rl.checkpoint"), context.outputs)
