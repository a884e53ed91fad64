"""Stage sft: flow-matching fine-tuning of the pre-trained base, or a checkpoint, on one dataset or a mixture of the
same robot's; the output is a policy folder.

The contrastive loss may stay on at a small weight, so that the value does not go stale while the backbone moves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from prts_core.config.identity import identity
from prts_core.config.schema import SftConfig
from prts_core.contract import require_equal
from prts_core.data import statistics
from prts_core.data.statistics import statistics_name
from prts_core.io.files import write_json
from prts_core.io.locks import locked
from prts_core.io.tensors import load_tensors
from prts_core.io.threads import torch_threads
from prts_core.policy.policy import policy_digest, save_policy
from prts_core.policy.processor import Processor, load_statistics
from prts_core.stages.mixture import Opened, open_datasets, open_image_text, training_sets
from prts_core.stages.pretrain import policy_contract
from prts_core.stages.training import train
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult
from prts_core.training.initial_weights import checkpoint_start, own_start


def sft(config: SftConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    torch.manual_seed(context.seed)
    checkpoint, fast = context.pinned("sft.checkpoint", config.checkpoint), context.pinned("sft.fast", config.fast)
    config = replace(config, checkpoint=checkpoint, fast=fast)
    if config.checkpoint is None:
        start = own_start(inputs["pretrain"].folder(context.outputs), random=not config.from_pretrained)
    else:
        start = checkpoint_start(config)
    model, model_config = start.model, start.model.config
    mixture = config.mixture or {config.dataset: 1.0}
    opened = open_datasets(mixture, inputs, context)
    dataset = opened[config.dataset][0]
    own = start.statistics(dataset.contract, config.train.normalization)
    file = own or statistics_of(config.dataset, opened, inputs, context, model_config.chunk_length)
    contract = policy_contract(dataset, file, model_config.chunk_length, config.train.normalization)
    processor = Processor(
        contract, load_statistics(file), file, start.tokenizer, start.fast, model_config, model.compat
    )
    conversations = {name: open_image_text(source, context.seed) for name, source in config.image_text.items()}
    processors = dict.fromkeys(opened, processor)
    sets, weights, held_out = training_sets(config, mixture, opened, processors, conversations, context.work)
    with torch_threads(config.train.threads):
        ema, metrics, early = train(model, sets, weights, config, context, held_out=held_out)
    save_policy(context.output, ema, model_config, processor)
    if early is not None:
        save_policy(context.output / "early", load_tensors(early)[0], model_config, processor)
    write_json(context.output / "train_config.json", identity(config.train))
    if config.checkpoint is not None:
        record = {"checkpoint": config.checkpoint, "files": context.files["sft.checkpoint"]}
        write_json(context.output / "start.json", record)
    write_json(context.output / "policy_digest.json", {"policy_digest": policy_digest(context.output)})
    return StageResult(metrics, {"policy": contract.fingerprint}, ("loss.png", "training.csv"))


def statistics_of(
    dataset: str, opened: Opened, inputs: dict[str, Manifest], context: StageContext, chunk_length: int
) -> Path:
    """The file with the statistics that a policy of `dataset` is normalised by: those of stage stats, or, where several
    datasets are mixed, of all their rows, computed here once."""
    contract = opened[dataset][0].contract
    name = statistics_name(contract, chunk_length)
    if len(opened) == 1:
        return inputs[f"stats:{dataset}"].folder(context.outputs) / name
    for other, (data, _) in opened.items():
        require_equal(contract, data.contract, left_name=f"dataset {dataset}", right_name=f"dataset {other}")
    path = context.work / name
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            roots = [data.root for data, _ in opened.values()]
            made = statistics.compute(roots, "train", chunk_length if any(contract.relative) else None)
            write_json(path, made.trained.to_json())
    return path
