"""Stage convert: raw recordings become a LeRobot v2.1 dataset, or one is imported; its Contract is born here.

Finished episodes are kept across interruptions: their records lie in the work folder.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.config.load import present_root
from prts_core.config.schema import ConvertConfig, ExpertSource, LeRobotSource, MetaworldSource, RecordingSource
from prts_core.contract import Contract
from prts_core.data.convert.lerobot_v21 import import_dataset
from prts_core.data.convert.mapping import Mapping, check_mapping
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert as convert_recording
from prts_core.data.convert.run import convert_any
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult

SIMULATOR_HZ = 80.0  # Meta-World steps a second; a row is `action_repeat` steps


def convert(config: ConvertConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write <output> as a LeRobot v2.1 dataset with meta/contract.json."""
    raw = inputs["collect"].folder(context.outputs)
    if isinstance(config.source, RecordingSource):
        contract = _convert_recording(config, config.source, context)
    elif isinstance(config.source, LeRobotSource):
        contract = import_dataset(
            present_root(config.dataset, config.source),
            context.output,
            dataset=config.dataset,
            source=config.source,
            robot=config.robot,
        )
    else:
        contract = convert_recording(
            raw,
            context.output,
            context.work / "episodes",
            mapping=_own_mapping(config, raw),
            dataset=config.dataset,
            robot=config.robot,
            video=config.video,
            workers=config.source.workers,
        )
    made = LeRobotDataset.open(context.output)
    return StageResult(
        metrics={
            "episodes": len(made.rows),
            "train_episodes": len(made.episodes("train")),
            "frames": made.info.total_frames,
            "tasks": len(made.tasks),
            "cameras": len(made.camera_keys),
        },
        contracts={config.dataset: contract.fingerprint},
        artifacts=("meta/info.json", "meta/contract.json"),
    )


def _own_mapping(config: ConvertConfig, raw: Path) -> Mapping:
    """What the keys of a recording that collect has made mean."""
    if isinstance(config.source, MetaworldSource):
        return native_mapping(raw, config.dataset, SIMULATOR_HZ / config.source.action_repeat)
    assert isinstance(config.source, ExpertSource)
    if config.source.mapping is None:
        return native_mapping(raw, config.dataset, None)  # the recording says its rate
    assert not isinstance(config.source.mapping, str), "the plan has read the mapping that the dataset names"
    return check_mapping(config.source.mapping, config.dataset)


def _convert_recording(config: ConvertConfig, source: RecordingSource, context: StageContext) -> Contract:
    """Convert a recording made elsewhere. That its files stay those of the key is `run_stage`'s to see."""
    root = present_root(config.dataset, source)
    assert not isinstance(source.mapping, str), "the plan has read the mapping that the dataset names"
    return convert_any(
        source.kind,
        root,
        context.output,
        context.work / "episodes",
        mapping=None if source.mapping is None else check_mapping(source.mapping, config.dataset),
        dataset=config.dataset,
        robot=config.robot,
        video=config.video,
        workers=source.workers,
        reencode=source.reencode,
    )
