"""Stage rl: the policy improves by what it earns in the simulator; the output is a policy folder."""

from __future__ import annotations

from dataclasses import asdict

from prts_core.config.identity import identity
from prts_core.config.rl import RlConfig
from prts_core.io.files import write_json
from prts_core.launch.signals import graceful
from prts_core.policy.policy import load_policy, policy_digest, save_policy
from prts_core.rl.film import write_film
from prts_core.rl.page import write_page
from prts_core.rl.report import CURVE, report, timing, write_curve
from prts_core.rl.run import Run
from prts_core.rollout.benchmark import suite_and_tasks
from prts_core.sim.pool import Pool
from prts_core.stages.policies import start_policy
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.tracking.tensorboard import event_log


def rl(config: RlConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    folder = start_policy(config, inputs, context)
    policy = load_policy(folder, "fp32")
    suite, tasks, size, made = suite_and_tasks(config, "rl")
    settings = config.replaced(tasks=tasks, image_size=size)
    events = context.outputs / "tensorboard" / context.recipe / f"rl-{context.work.parent.name[:12]}"
    with event_log(events, config.tensorboard, context.log) as log, graceful() as stop:
        run = Run(policy, suite, made, settings, context.seed, context.work, folder, log)
        found = run.run(stop)
    # Weights that never learned what good is are not asked for it.
    processor = policy.processor if found.chosen else run.learner.terms.processor
    save_policy(context.output, found.weights, policy.model.config, processor)
    write_json(context.output / "train_config.json", identity(config))
    with Pool(run.launch, 1) as pool:
        evaluation = run.folders.evaluations / f"{found.chosen:06d}"
        film = write_film(pool, found.plan, evaluation, context.output, found.chosen)
    told = report(config, found)
    more = {"policy_digest": policy_digest(context.output), "film": None if film is None else asdict(film)}
    write_json(context.output / "report.json", told | more)
    write_curve(context.output, found.rows)
    write_page(context.output / "page.html", config, found, film)
    write_json(context.work / "timing.json", timing(found.rows))
    figures = {"success_rate": told["after"]["rate"], "success_rate_before": told["before"]["rate"]}
    artifacts = ("page.html", CURVE, "report.json", *([] if film is None else [film.name]))
    return StageResult(figures, {"policy": policy.contract.fingerprint}, artifacts)
