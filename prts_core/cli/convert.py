"""`prts convert --source KIND`: one recording of any kind becomes a LeRobot v2.1 dataset, outside of a recipe.

Kinds are registered in prts_core.data.convert.source.

  prts convert --source robomimic --mapping configs/mappings/libero.yaml --from recordings --to datasets/libero
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prts_core.cli.main import plain_console
from prts_core.io.errors import ConfigError, lookup

WORKERS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool = parser.add_argument_group("a recording outside of a recipe")
    tool.add_argument("--source", metavar="KIND", help="what kind of recording (an unknown name lists them)")
    tool.add_argument("--from", dest="recording", type=Path, metavar="PATH", help="its folder or file; only read")
    tool.add_argument("--to", type=Path, metavar="DIR", help="the dataset to write")
    tool.add_argument("--mapping", type=Path, metavar="FILE", help="what its keys mean: configs/mappings/<name>.yaml")
    tool.add_argument("--robot", type=Path, metavar="FILE", help="configs/robots/<tag>.yaml (default: the mapping's)")
    tool.add_argument(
        "--format", choices=("v2.1", "v3.0"), default="v2.1", help="of LeRobot; v3.0 takes --source lerobot_v21"
    )
    tool.add_argument(
        "--reencode",
        action="store_true",
        help="of --source lerobot_v30: encode the episodes that cannot be cut as they are (default: refuse them)",
    )
    tool.add_argument(
        "--workers", type=int, default=WORKERS, help="episodes at a time (default: %(default)s); --set video.codec=..."
    )


def main(args: argparse.Namespace) -> int:
    from prts_core.config.checked_yaml import check, merge, parse_overrides, read_yaml
    from prts_core.config.mapping import load_mapping
    from prts_core.config.schema import RobotConfig, VideoConfig
    from prts_core.data.convert.run import convert_any
    from prts_core.data.convert.source import DATASETS, SOURCES
    from prts_core.data.lerobot_v21.schema import read_info

    lookup(SOURCES | DATASETS, args.source or "", "source")
    for name, value in (("--from", args.recording), ("--to", args.to)):
        if value is None:
            raise ConfigError(f"prts convert --source needs {name}", field=name)
    work = places(args.recording, args.to)
    changes = parse_overrides(args.overrides)
    unknown = [name for name in changes if name != "video"]
    if unknown:
        raise ConfigError(
            "Only video settings can be changed here", field="--set", found=unknown[0], expected="--set video.crf=20"
        )
    video = check(VideoConfig, merge({}, changes.get("video", {})), "--set video")
    robot = check(RobotConfig, read_yaml(args.robot), args.robot) if args.robot else None
    if args.format == "v3.0":
        return export(args, work)
    mapping = load_mapping(args.mapping) if args.mapping else None
    if robot is None and mapping is not None and mapping.embodiment_tag is not None:
        path = args.mapping.parent.parent / "robots" / f"{mapping.embodiment_tag}.yaml"
        robot = check(RobotConfig, read_yaml(path), path)
    if args.reencode and args.source != "lerobot_v30":
        raise ConfigError(
            "Only episodes of LeRobot v3.0 are cut out of longer videos",
            field="--reencode",
            found=args.source,
            expected="--source lerobot_v30",
            cure="leave --reencode out: other recordings are encoded in any case",
        )
    contract = convert_any(
        args.source,
        args.recording,
        args.to,
        work,
        mapping=mapping,
        dataset=args.to.name,
        robot=robot,
        video=video,
        workers=args.workers,
        reencode=args.reencode,
    )
    info = read_info(args.to)
    what = f"{info.total_episodes} episodes, {info.total_frames} frames, {contract.fingerprint[:19]}"
    plain_console().print(f"{args.to}: {what}")
    return 0


def export(args: argparse.Namespace, work: Path) -> int:
    """LeRobot v2.1 to v3.0."""
    from prts_core.data.convert.lerobot_v30_export import export

    if args.source != "lerobot_v21" or args.mapping is not None:
        raise ConfigError(
            "Only LeRobot v2.1 datasets are written as v3.0",
            field="--source",
            found=args.source,
            expected="lerobot_v21, without --mapping",
            cure="convert the recording to v2.1 first, then that to v3.0",
        )
    export(args.recording, args.to, work, workers=args.workers)
    plain_console().print(f"{args.to}: LeRobot v3.0")
    return 0


def places(recording: Path, to: Path) -> Path:
    """The folder of resume records beside `to`. Refuses places where something would be overwritten."""
    if not recording.exists():
        raise ConfigError("There is no such recording", field="--from", found=str(recording))
    ours, theirs = to.resolve(), recording.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(
            "The dataset and the recording lie in each other",
            field="--to",
            found=str(to),
            expected=f"a folder outside of {recording}",
        )
    work = to.parent / f".{to.name}.convert"
    if to.exists() and (not to.is_dir() or any(to.iterdir())) and not work.is_dir():
        raise ConfigError(
            "The folder to write holds something that this command did not make",
            field="--to",
            found=str(to),
            expected="a new folder, or one that an earlier `prts convert` began",
            cure="choose another folder",
        )
    return work
