"""Stage subtask: a fine-tuned policy learns to say the next subtask before it acts (pi0.5 with knowledge insulation).

pi(a, l^ | o, l) = pi(a | o, l^) pi(l^ | o, l): cross-entropy on the subtask's words and flow matching on actions, whose
gradient stops at the backbone. An episode without any says its own instruction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prts_core.config.identity import identity
from prts_core.config.schema import SubtaskConfig
from prts_core.data.index import open_indexed
from prts_core.io.files import write_json
from prts_core.io.threads import POLICY_THREADS, torch_threads
from prts_core.policy.policy import load_policy, policy_digest, save_policy
from prts_core.policy.subtask_scores import Score, score_subtasks
from prts_core.stages.training import train
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.training.datasets import RobotDataset, held_out_set
from prts_core.training.shared_files import SHARED, SharedFiles


def subtask(config: SubtaskConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    policy = load_policy(inputs["sft"].folder(context.outputs), "fp32")
    dataset, index = open_indexed(*(inputs[stage].folder(context.outputs) for stage in ("convert", "stats")))
    processor = replace(policy.processor, subtasks=True)
    episodes = spread(dataset.episodes("train"), config.episodes)
    shared = SharedFiles(context.work / SHARED)
    rows = RobotDataset(
        config.dataset,
        dataset,
        index,
        processor,
        episodes,
        augmented=config.train.augment,
        failures=config.train.failures,
        say_subtask=True,
        shared=shared,
    )
    model = policy.model.train()
    held_out = []
    if config.train.eval_every:
        held_out = held_out_set(config.dataset, dataset, index, processor, say_subtask=True, shared=shared)
    with torch_threads(config.train.threads):
        weights, metrics, _ = train(
            model, [rows], [1.0], config, context, ema=config.export == "average", held_out=held_out
        )
    save_policy(context.output, weights, model.config, processor)
    # What was saved is scored: the trained module may lie on a GPU, or in parts over several.
    with torch_threads(POLICY_THREADS):
        score = score_subtasks(load_policy(context.output), dataset, index, episodes, config.score_every)
    write_json(context.output / "train_config.json", identity(config.train))
    write_json(
        context.output / "report.json",
        report(config, episodes, score) | {"policy_digest": policy_digest(context.output)},
    )
    figures = {} if score is None else {"exact_match": score.exact_match, "baseline_commonest": score.baseline}
    return StageResult(
        metrics | figures, {"policy": processor.contract.fingerprint}, ("loss.png", "report.json", "training.csv")
    )


def spread(episodes: list[int], count: int | None) -> list[int]:
    """`count` of the episodes at even distances, so that every task of an ordered dataset is met; all if fewer."""
    if count is None or count >= len(episodes):
        return episodes
    return [episodes[int(i)] for i in np.linspace(0, len(episodes) - 1, count).round()]


def report(config: SubtaskConfig, episodes: list[int], score: Score | None) -> dict[str, object]:
    """What was trained on, which weights were exported, and how often the held-out words were exactly right."""
    start = 1.0
    for step in range(config.train.steps):
        start *= min(config.train.ema_decay, (1 + step) / (10 + step))
    exported: dict[str, object] = {"weights": config.export}
    if config.export == "average":
        exported["share_of_the_starting_weights"] = start
    return {"exported": exported, "episodes": episodes, "heldout": None if score is None else score.to_json()}
