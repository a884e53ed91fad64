"""Stage convert: raw recordings become a LeRobot v2.1 dataset, or one is taken over; its Contract is born here.

Finished episodes are kept across interruptions: their records lie in the work folder.
"""

from __future__ import annotations

from pathlib import Path

from prts_core.config.load import present_root, source_url
from prts_core.config.mapping import Mapping, check_mapping
from prts_core.config.schema import ConvertConfig
from prts_core.config.sources import ExpertSource, LeRobotSource, RecordingSource
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert_any
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.files import read_json
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext, StageResult


def convert(config: ConvertConfig, inputs: dict[str, Manifest], context: StageContext) -> StageResult:
    """Write <output> as a LeRobot dataset with meta/contract.json: v2.1, or the version of one that is taken over as it
    is."""
    source = config.source
    if isinstance(source, LeRobotSource):
        url, listed = source_url(source), inputs["collect"].folder(context.outputs) / "files.json"
        contract = import_lerobot(
            url or present_root(config.dataset, source),
            context.output,
            dataset=config.dataset,
            source=source,
            robot=config.robot,
            digests=None if url else {row["path"]: row["sha256"] for row in read_json(listed)},
        )
    else:
        raw, reencode = inputs["collect"].folder(context.outputs), False
        if isinstance(source, RecordingSource):  # made elsewhere: `run_stage` sees that its files stay those of the key
            raw, reencode = present_root(config.dataset, source), source.reencode
        mapping = _mapping(config, raw)
        contract = convert_any(
            source.kind if mapping is None else mapping.source,
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


def _mapping(config: ConvertConfig, raw: Path) -> Mapping | None:
    """What the keys of a recording mean; none for a dataset, which says it itself."""
    source = config.source
    if isinstance(source, ExpertSource) and source.mapping is None:
        return native_mapping(raw, config.dataset)
    if not isinstance(source, RecordingSource | ExpertSource) or source.mapping is None:
        return None
    assert not isinstance(source.mapping, str), "the plan has read the mapping that the dataset names"
    return check_mapping(source.mapping, config.dataset)
