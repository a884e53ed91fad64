"""Stage sft: flow-matching fine-tuning of the pre-trained base on one dataset; the output is a policy folder.

The contrastive loss may stay on at a small weight, so that the value does not go stale while the backbone moves.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from prts_core.config.schema import SftConfig
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.statistics import statistics_name
from prts_core.data.training_set import RobotSet, held_out_set
from prts_core.files import write_json
from prts_core.manifest import Manifest
from prts_core.models.init import init_number_embeddings, open_gates
from prts_core.models.prts import PrtsModel
from prts_core.policy import policy_digest, read_model_config, save_policy
from prts_core.processor import Processor, load_statistics
from prts_core.stages.base import StageContext, StageResult
from prts_core.stages.pretrain import policy_contract
from prts_core.stages.training import train
from prts_core.tensors import load_tensors, load_weights
from prts_core.text import prompt
from prts_core.text.fast import FastTokenizer
from prts_core.text.tokenizer import TextTokenizer


def sft(config: SftConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    base = inputs["pretrain"].folder(context.outputs)
    model_config = read_model_config(base)
    dataset = LeRobotDataset.open(inputs["convert"].folder(context.outputs))
    statistics = inputs["stats"].folder(context.outputs) / statistics_name(dataset.contract, model_config.chunk_length)
    contract = policy_contract(dataset, statistics, model_config.chunk_length, config.train.normalization)
    tokenizer = TextTokenizer.load(base / "tokenizer.json")
    processor = Processor(
        contract, load_statistics(statistics), statistics, tokenizer,
        FastTokenizer.load(base / "fast_tokenizer.json"), model_config,
    )  # fmt: skip
    torch.manual_seed(context.seed)
    model = PrtsModel(model_config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    if config.from_pretrained:
        load_weights(model, load_tensors(base / "model.safetensors")[0], base / "model.safetensors")
    else:
        init_number_embeddings(model, tokenizer.number_ids())
        open_gates(model.dit_action_head)
    rows = RobotSet(
        config.dataset, dataset, processor, dataset.episodes("train"),
        augmented=config.train.augment, train_subtask=config.train_subtask,
    )  # fmt: skip
    options = {"train_subtask": config.train_subtask}
    held_out = held_out_set(config.dataset, dataset, processor, **options) if config.train.eval_every else []
    average, metrics, early = train(model, [rows], [1.0], config, context, held_out=held_out)
    save_policy(context.output, average, model_config, processor)
    if early is not None:
        save_policy(context.output / "early", load_tensors(early)[0], model_config, processor)
    write_json(context.output / "train_config.json", asdict(config.train))
    write_json(context.output / "policy_digest.json", {"policy_digest": policy_digest(context.output)})
    return StageResult(metrics, {"policy": contract.fingerprint}, ("loss.png", "training.csv"))
