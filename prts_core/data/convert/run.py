"""Convert recordings of any kind to a LeRobot v2.1 dataset: one runner for every source.

One episode is in memory per worker; each is finished when its record stands in the work folder, and what is finished is
never encoded again. The result does not depend on workers or interruptions.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from prts_core.config.mapping import Mapping
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.ahead import run_parallel
from prts_core.data.convert.apply import ConversionPlan, apply_mapping, columns_and_images
from prts_core.data.convert.source import DATASETS, RawEpisode, Recording, Source, source_class
from prts_core.data.lerobot_v21.writer import EpisodeToWrite, Layout, finish, is_finished, write_episode
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_value


@dataclass(frozen=True)
class ConvertJob:
    """One episode and its place in the dataset. identity: changes with whatever its files depend on."""

    raw: RawEpisode
    index: int
    start: int
    task_index: int
    identity: str


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
            raise ConfigError(
                f"A dataset of kind {kind!r} says itself what its numbers mean",
                field="mapping",
                found=mapping.name,
                cure="leave the mapping out",
            )
        more = {"reencode": video} if reencode else {}
        import_dataset = importlib.import_module(DATASETS[kind]).import_dataset
        return import_dataset(root, output, work, dataset=dataset, robot=robot, workers=workers, **more)
    if mapping is None:
        raise ConfigError(
            "A recording does not say what its numbers mean",
            field="mapping",
            expected="a file such as those in configs/mappings/",
            cure="copy the nearest of them and correct its keys",
        )
    if mapping.source != kind:
        raise ConfigError(
            "The mapping is for another kind of recording",
            file=f"the mapping {mapping.name}",
            field="source",
            found=mapping.source,
            expected=kind,
        )
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
    layout = Layout(
        root=output,
        state=work,
        features=plan.features,
        fps=plan.contract.control_hz,
        robot_type=plan.contract.embodiment,
        video=video,
    )
    jobs = _jobs(_in_order(recording, mapping, root), plan, video, root)
    todo = [job for job in jobs if not is_finished(layout, job.index, job.identity)]
    run_parallel(partial(_convert_one, source, plan, layout, root), todo, workers, "converting episodes")
    finish(layout, len(jobs), _splits(jobs), plan.contract)
    return plan.contract


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
        raise DataError(
            "An episode has no instruction",
            file=root,
            field=silent.key,
            cure="say it with `task` in the mapping",
        )
    keys = [episode.key for episode in episodes]
    assert len(set(keys)) == len(keys), "a source gives every episode a key of its own"
    return [episode for name in names for episode in episodes if episode.split == name]


def _jobs(episodes: list[RawEpisode], plan: ConversionPlan, video: VideoConfig, root: Path) -> list[ConvertJob]:
    settings = digest_value([asdict(plan.mapping), plan.contract.to_json(), plan.features, asdict(video)])
    sizes: dict[str, list[int]] = {}
    tasks: dict[str, int] = {}
    jobs, start = [], 0
    for index, episode in enumerate(episodes):
        for file in episode.files or ("",):
            if file not in sizes:
                stat = (root / file).stat()
                sizes[file] = [stat.st_size, stat.st_mtime_ns]
        task_index = tasks.setdefault(episode.task, len(tasks))
        seen = [[file, *sizes[file]] for file in episode.files or ("",)]
        identity = digest_value(
            [settings, seen, episode.key, episode.length, episode.task, episode.extra, index, start, task_index]
        )
        jobs.append(ConvertJob(episode, index, start, task_index, identity))
        start += episode.length
    return jobs


def _convert_one(source: Source, plan: ConversionPlan, layout: Layout, root: Path, job: ConvertJob) -> None:
    """Read one episode and write it (runs in a worker thread)."""
    arrays = source.read(job.raw, plan.mapping.keys)
    columns, images = columns_and_images(plan, job.raw, arrays, root)
    episode = EpisodeToWrite(
        index=job.index,
        start=job.start,
        key=job.identity,
        task=job.raw.task,
        task_index=job.task_index,
        columns=columns,
        images=images,
        extra=job.raw.extra,
    )
    write_episode(layout, episode)


def _splits(jobs: list[ConvertJob]) -> dict[str, range]:
    splits: dict[str, range] = {}
    for job in jobs:
        first = splits.get(job.raw.split, range(job.index, job.index)).start
        splits[job.raw.split] = range(first, job.index + 1)
    return splits
