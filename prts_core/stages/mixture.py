"""Open what a stage trains on: robot datasets by their indexes, image-text data beside them, and the share of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from prts_core.config.load import image_text_paths
from prts_core.config.schema import MixBy
from prts_core.config.sources import ImageTextSource
from prts_core.config.train import TrainConfig
from prts_core.data.index import DatasetIndex, open_indexed
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.llava import LlavaDataset
from prts_core.io.errors import ConfigError
from prts_core.io.files import digest_file
from prts_core.policy.processor import Processor
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext
from prts_core.training.batch import SampleSource
from prts_core.training.datasets import RobotDataset, VqaDataset, held_out_set
from prts_core.training.shared_files import SHARED, SharedFiles

Opened = dict[str, tuple[LeRobotDataset, DatasetIndex]]


class Mixed(Protocol):
    """A stage's configuration that says what it trains on."""

    @property
    def train(self) -> TrainConfig: ...
    @property
    def train_subtask(self) -> Mapping[str, bool | str]: ...
    @property
    def image_text(self) -> Mapping[str, ImageTextSource]: ...
    @property
    def mix_by(self) -> MixBy: ...


def open_datasets(names: Iterable[str], inputs: Mapping[str, Manifest], context: StageContext) -> Opened:
    """Of stages convert and stats, whose roles are `<stage>:<dataset>`."""
    roots = {n: [inputs[f"{stage}:{n}"].folder(context.outputs) for stage in ("convert", "stats")] for n in names}
    return {name: open_indexed(*folders) for name, folders in roots.items()}


def open_image_text(source: ImageTextSource, seed: int) -> LlavaDataset:
    """The image-text data that a recipe names, checked."""
    path, root = image_text_paths(source)
    if source.digest is not None and path.is_file() and source.digest != (found := digest_file(path)):
        raise ConfigError(
            "The file of image-text data is not the one that is meant",
            file=path,
            field="digest",
            found=found,
            expected=source.digest,
            cure="restore the file, or correct the digest",
        )
    return LlavaDataset.open(path, root, source.sampling_strategy, seed, source.max_tokens)


def training_sets(
    config: Mixed,
    weights: Mapping[str, float],
    opened: Opened,
    processors: Mapping[str, Processor],
    conversations: Mapping[str, LlavaDataset],
    work: Path,
) -> tuple[list[SampleSource], list[float], list[SampleSource]]:
    """(sets, the weight of a row of each, held-out sets where the recipe evaluates on them).

    weights: of the datasets; image-text data has its own. work: the stage's work folder.
    """
    shared = SharedFiles(work / SHARED)
    sets: list[SampleSource] = []
    held_out: list[SampleSource] = []
    for name, (dataset, index) in opened.items():
        sets.append(
            RobotDataset(
                name,
                dataset,
                index,
                processors[name],
                dataset.episodes("train"),
                augmented=config.train.augment,
                failures=config.train.failures,
                train_subtask=config.train_subtask.get(name),
                shared=shared,
            )
        )
    reads = next(iter(processors.values()))
    sets += [VqaDataset(name, data, reads, shared) for name, data in conversations.items()]
    for name, (dataset, index) in opened.items() if config.train.eval_every else ():
        options = {"train_subtask": config.train_subtask.get(name), "shared": shared}
        held_out += held_out_set(name, dataset, index, processors[name], **options)
    stated = [*(weights[name] for name in opened), *(config.image_text[name].weight for name in conversations)]
    if config.mix_by == "samples":
        stated = [weight / len(data) for weight, data in zip(stated, sets, strict=True)]
    return sets, stated, held_out
