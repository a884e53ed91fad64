"""Stages collect and convert of a suite's scripted experts: recorded through workers, converted by what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from prts_core.config.checked_yaml import check
from prts_core.config.schema import CollectConfig, ConvertConfig, DatasetConfig, VideoConfig
from prts_core.config.sources import ExpertSource
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError
from prts_core.sim.suites import suite
from prts_core.stages.collect import collect
from prts_core.stages.convert import convert
from prts_core.store.stage import StageContext

SOURCE = ExpertSource(
    "expert", "tests.fixtures.toy_family:toy", ("push", "drawn"), train_episodes=3, heldout_episodes=1, tail_steps=1
)


def context(folder: Path) -> StageContext:
    return StageContext(folder, folder / "work", 7, "toy", "toy")


def test_metaworlds_short_form_is_read_as_experts(tmp_path: Path) -> None:
    """Sentences, limits, levels of noise and settings of the simulator that a YAML of `kind: metaworld` gives."""
    task = {"name": "dial-turn", "instruction": "turn the dial", "max_steps": 90, "expert_noise": [0.1]}
    raw = {"name": "d", "source": {"kind": "metaworld", "tasks": [task], "train_episodes": 3, "tail_rows": 2}}
    source = check(DatasetConfig, raw, "d.yaml").source
    assert isinstance(source, ExpertSource)
    assert (source.suite, source.train_episodes, source.tail_steps) == ("metaworld", 3, 2)
    assert source.task_noise == {"dial-turn": (0.1,)}
    spec = suite("metaworld", source.settings)
    assert [(t.name, t.instruction, t.max_steps) for t in spec.tasks] == [("dial-turn", "turn the dial", 45)]
    assert "8 cm" in spec.source


def test_held_out_demonstrations_are_not_shaken_and_none_may_be_asked_for(tmp_path: Path) -> None:
    shaken = replace(SOURCE, tasks=("push",), noise=(0.3,))
    where = context(tmp_path / "some")
    collect(CollectConfig("toy", shaken), {}, where)
    levels = {
        split: {float(demo.attrs["expert_noise"]) for demo in demos(where.output / split / "push_demo.hdf5")}
        for split in ("train", "heldout")
    }
    assert levels == {"train": {0.3}, "heldout": {0.0}}
    where = context(tmp_path / "none")
    made = collect(CollectConfig("toy", replace(shaken, heldout_episodes=0)), {}, where)
    assert made.metrics["episodes"] == SOURCE.train_episodes and not (where.output / "heldout").exists()


def test_experts_become_a_dataset(tmp_path: Path) -> None:
    where = context(tmp_path)
    made = collect(CollectConfig("toy", SOURCE), {}, where)
    assert made.metrics == {"tasks": 2, "episodes": 8, "dropped_attempts": 0}
    raw = where.output
    assert sorted(p.relative_to(raw).as_posix() for p in raw.rglob("*.hdf5")) == [
        f"{split}/{task}_demo.hdf5" for split in ("heldout", "train") for task in ("drawn", "push")
    ]
    seeds = {
        split: {int(demo.attrs["seed"]) // 1000 for path in (raw / split).iterdir() for demo in demos(path)}
        for split in ("train", "heldout")
    }
    assert seeds == {"train": {100}, "heldout": {150}}, "the splits must not share an episode"

    target = context(tmp_path / "converted")
    video = VideoConfig()
    config = ConvertConfig("toy", SOURCE, None, video)
    inputs = {"collect": Placed(raw)}
    convert(config, inputs, target)  # type: ignore[arg-type]
    dataset = LeRobotDataset.open(target.output)
    assert len(dataset.episodes("train")) == 6 and len(dataset.rows) == 8
    assert dataset.info.fps == 10.0 and dataset.contract.cameras[0].key.endswith("eye")


class Placed:
    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, outputs: Path) -> Path:
        return self.path


def demos(path: Path) -> list[h5py.Group]:
    return list(h5py.File(path)["data"].values())


def test_a_task_that_the_suite_lacks_is_named(tmp_path: Path) -> None:
    source = ExpertSource("expert", "tests.fixtures.toy_family:toy", ("pushh",))
    with pytest.raises(ConfigError, match="push"):
        collect(CollectConfig("toy", source), {}, context(tmp_path))
