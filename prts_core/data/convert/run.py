"""Convert recordings of any kind to a LeRobot v2.1 dataset: one runner for every source.

One episode is in memory per worker, and what is finished is never encoded again. The result does not depend on workers
or interruptions.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from prts_core.config.mapping import Mapping
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.convert.apply import ConversionPlan, apply_mapping, columns_and_images
from prts_core.data.convert.resume import Unit, run_units
from prts_core.data.convert.source import DATASETS, RawEpisode, Recording, Source, source_class
from prts_core.data.lerobot_v21.writer import EpisodeToWrite, Layout, finish, write_episode
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_value


def convert_any(
    kind: str,
    root: Path,
    output: Path,
    work: Path,
    *,
    mapping: Mapping | None,
    dataset: str,
    robot: RobotConfig | None,
    video: VideoConfig,
    workers: int = 2,
    reencode: bool = False,
) -> Contract:
    """What the command line and the stage call: a recording by its mapping (`convert`), or a whole dataset, which takes
    none. reencode: of LeRobot v3.0, encode with `video` the episodes that cannot be cut out of their file as they are.
    """
    if kind in DATASETS:
        if mapping is not None:
            problem = f"A dataset of kind {kind!r} says itself what its numbers mean"
            raise ConfigError(problem, field="mapping", found=mapping.name, cure="leave the mapping out")
        more = {"reencode": video} if reencode else {}
        import_dataset = importlib.import_module(DATASETS[kind]).import_dataset
        return import_dataset(root, output, work, dataset=dataset, robot=robot, workers=workers, **more)
    if mapping is None:
        problem, expected = (
            "A recording does not say what its numbers mean",
            "a file such as those in configs/mappings/",
        )
        cure = "copy the nearest of them and correct its keys"
        raise ConfigError(problem, field="mapping", expected=expected, cure=cure)
    if mapping.source != kind:
        problem, file = "The mapping is for another kind of recording", f"the mapping {mapping.name}"
        raise ConfigError(problem, file=file, field="source", found=mapping.source, expected=kind)
    return convert(root, output, work, mapping=mapping, dataset=dataset, robot=robot, video=video, workers=workers)


def convert(
    root: Path,
    output: Path,
    work: Path,
    *,
    mapping: Mapping,
    dataset: str,
    robot: RobotConfig | None,
    video: VideoConfig,
    workers: int = 2,
) -> Contract:
    """Convert the recording at `root` into the LeRobot v2.1 dataset `output`; train episodes come first.

    work: folder of resume records. Raises DataError for a recording that breaks its format or that the mapping does
    not fit, ContractError where the robot says something else; `root` is only read, finished episodes are kept.
    """
    source = source_class(mapping.source)(root, mapping)
    recording = source.scan()
    plan = apply_mapping(mapping, recording, root=root, dataset=dataset, robot=robot, video=video)
    contract = plan.contract
    layout = Layout(output, plan.features, contract.control_hz, contract.embodiment, video)
    episodes = _in_order(recording, mapping, root)
    units = list(_units(source, plan, layout, episodes, root))
    finish(layout, run_units(units, work, workers=workers, what="converting episodes"), _splits(episodes), contract)
    return contract


def _in_order(recording: Recording, mapping: Mapping, root: Path) -> list[RawEpisode]:
    """Episodes split by split, train first; every one with an instruction."""
    episodes = list(recording.episodes)
    if not episodes:
        raise DataError("A recording holds no episodes", file=root, expected=f"episodes of kind {mapping.source}")
    names = list(dict.fromkeys(["train", *(episode.split for episode in episodes)]))
    held = mapping.heldout_episodes
    if held and (len(names) > 1 or held >= len(episodes)):
        raise ConfigError(
            f"The mapping {mapping.name!r} cannot hold out that many episodes",
            field="heldout_episodes",
            found=held,
            expected=f"0 to {len(episodes) - 1}" if len(names) == 1 else f"0: the recording has splits {names}",
        )
    if held:
        cut = len(episodes) - held
        episodes = episodes[:cut] + [replace(episode, split="heldout") for episode in episodes[cut:]]
        names.append("heldout")
    episodes = [replace(episode, task=mapping.task or episode.task) for episode in episodes]
    silent = next((episode for episode in episodes if not episode.task.strip()), None)
    if silent is not None:
        cure = "say it with `task` in the mapping"
        raise DataError("An episode has no instruction", file=root, field=silent.key, cure=cure)
    keys = [episode.key for episode in episodes]
    assert len(set(keys)) == len(keys), "a source gives every episode a key of its own"
    return [episode for name in names for episode in episodes if episode.split == name]


def _units(
    source: Source, plan: ConversionPlan, layout: Layout, episodes: list[RawEpisode], root: Path
) -> Iterator[Unit]:
    settings = digest_value([asdict(plan.mapping), plan.contract.to_json(), plan.features, asdict(layout.video)])
    tasks: dict[str, int] = {}
    start = 0
    for index, raw in enumerate(episodes):
        number = tasks.setdefault(raw.task, len(tasks))
        episode = EpisodeToWrite(index, start, raw.key, raw.task, number, {}, {}, raw.extra)
        yield Unit(
            name=f"{index:06d}",
            sources=tuple(root / file for file in raw.files or ("",)),
            outputs=tuple(layout.root / file for file in layout.files(index)),
            settings=(settings, raw.key, raw.length, raw.task, raw.extra, index, start, number),
            work=partial(_convert_one, source, plan, layout, root, raw, episode),
        )
        start += raw.length


def _convert_one(
    source: Source, plan: ConversionPlan, layout: Layout, root: Path, raw: RawEpisode, episode: EpisodeToWrite
) -> dict[str, Any]:
    """Read one episode and write it (runs in a worker thread)."""
    columns, images = columns_and_images(plan, raw, source.read(raw, plan.mapping.keys), root)
    return write_episode(layout, replace(episode, columns=columns, images=images))


def _splits(episodes: list[RawEpisode]) -> dict[str, range]:
    splits: dict[str, range] = {}
    for index, episode in enumerate(episodes):
        first = splits.get(episode.split, range(index, index)).start
        splits[episode.split] = range(first, index + 1)
    return splits
