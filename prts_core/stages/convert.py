"""Stage convert: raw recordings become a LeRobot v2.1 dataset, or one is imported; its Contract is born here.

Finished episodes are kept across interruptions: their records lie in the work folder.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.config.load import present_root
from prts_core.config.mapping import Mapping, check_mapping
from prts_core.config.schema import ConvertConfig, ExpertSource, LeRobotSource, MetaworldSource, RecordingSource
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert_any
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult

SIMULATOR_HZ = 80.0  # Meta-World steps a second; a row is `action_repeat` steps


def convert(config: ConvertConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write <output> as a LeRobot v2.1 dataset with meta/contract.json."""
    source = config.source
    if isinstance(source, LeRobotSource):
        contract = import_lerobot(
            present_root(config.dataset, source),
            context.output,
            dataset=config.dataset,
            source=source,
            robot=config.robot,
        )
    else:
        kind, raw, reencode = "robomimic", inputs["collect"].folder(context.outputs), False
        if isinstance(source, RecordingSource):  # made elsewhere: `run_stage` sees that its files stay those of the key
            kind, raw, reencode = source.kind, present_root(config.dataset, source), source.reencode
        mapping = _mapping(config, source, raw)
        contract = convert_any(
            mapping.source if mapping is not None and isinstance(source, ExpertSource) else kind,
            raw,
            context.output,
            context.work / "episodes",
            mapping=mapping,
            dataset=config.dataset,
            robot=config.robot,
            video=config.video,
            workers=source.workers,
            reencode=reencode,
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


def _mapping(
    config: ConvertConfig, source: RecordingSource | MetaworldSource | ExpertSource, raw: Path
) -> Mapping | None:
    """What the keys of a recording mean; none for a dataset, which says it itself."""
    if isinstance(source, MetaworldSource):
        return native_mapping(raw, config.dataset, SIMULATOR_HZ / source.action_repeat)
    if source.mapping is None:  # a recording of experts says its rate
        return native_mapping(raw, config.dataset, None) if isinstance(source, ExpertSource) else None
    assert not isinstance(source.mapping, str), "the plan has read the mapping that the dataset names"
    return check_mapping(source.mapping, config.dataset)
