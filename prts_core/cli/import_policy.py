"""Turn a checkpoint of the public release into a policy folder that serve and fine-tuning take: `prts import-policy`.

It knows no file of the checkpoint: prts_core.release.policy does.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prts_core.cli.main import plain_console
from prts_core.io.errors import ConfigError

if TYPE_CHECKING:
    from prts_core.contract import PolicyContract

EPILOG = """\
examples
  fast=physical-intelligence/fast
  prts import-policy checkpoints/libero --fast $fast --robot libero_panda --hz 10 --out policies/libero
  prts import-policy owner/name --fast $fast --robot flexiv --hz 30 --state-relative --out policies/flexiv

The folder needs config.json, *.safetensors, statistics.json and the tokenizer's files, as the public code saves them.
What it does not say is asked for: the robot, its control rate, and whether actions are relative to the state. A
checkpoint that is pre-trained only cannot act: name it in a recipe as sft.checkpoint instead.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder or hub id of the public release's layout")
    parser.add_argument("--out", type=Path, required=True, help="the policy folder to write; must not exist")
    parser.add_argument(
        "--fast", required=True, help="the published FAST processor it was trained with, folder or hub id"
    )
    parser.add_argument("--robot", required=True, metavar="TAG", help="embodiment tag, such as libero_panda")
    parser.add_argument("--hz", type=float, required=True, help="rows a second of the training data")
    parser.add_argument("--dataset", help="whose statistics to take (default: the first in statistics.json)")
    parser.add_argument(
        "--state-relative",
        action="store_true",
        help="actions were trained relative to the state, in the dimensions that the robot's YAML marks",
    )
    parser.add_argument(
        "--robots", type=Path, default=Path("configs/robots"), help="where robots' YAML lies (default: %(default)s)"
    )
    parser.add_argument(
        "--view-tokens",
        type=int,
        nargs=2,
        default=(64, 144),
        metavar=("MIN", "MAX"),
        help="visual tokens of a view (default: 64 144, as in the public launchers)",
    )
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")


def main(args: argparse.Namespace) -> int:
    from prts_core.io.files import new_folder
    from prts_core.release.checkpoint import fetch
    from prts_core.release.policy import import_released

    if not (args.hz > 0 and 0 < args.view_tokens[0] <= args.view_tokens[1]):
        raise ConfigError(
            "A number of the command line is out of range",
            field="--hz, --view-tokens",
            found=f"{args.hz:g}, {args.view_tokens}",
            expected="a rate above 0; 0 < MIN <= MAX",
        )
    with new_folder(args.out) as partial:
        folder = fetch(args.checkpoint, args.revision)
        relative = relative_marks(folder, args) if args.state_relative else None
        policy = import_released(
            folder,
            partial,
            fast=args.fast,
            control_hz=args.hz,
            embodiment_tag=args.robot,
            repo_id=args.dataset,
            relative=relative,
            view_tokens=tuple(args.view_tokens),
        )
    tell(policy.contract, args.out)
    return 0


def relative_marks(folder: Path, args: argparse.Namespace) -> tuple[bool, ...]:
    """One mark per action dimension of the checkpoint, from the robot's YAML."""
    from prts_core.config.checked_yaml import check, read_yaml
    from prts_core.config.schema import RobotConfig
    from prts_core.data.release_statistics import read_statistics

    path = args.robots / f"{args.robot}.yaml"
    robot = check(RobotConfig, read_yaml(path), path)
    marks = robot.relative or tuple(dimension.relative for dimension in robot.action)
    if not any(marks):
        raise ConfigError(
            "The robot marks no action as relative to the state",
            file=path,
            field="relative",
            found="nothing",
            expected="one mark per action dimension",
        )
    width = read_statistics(folder / "statistics.json").dataset(args.dataset).norm_stats().action.width
    return marks[:width] if robot.truncate else marks


def tell(contract: PolicyContract, out: Path) -> None:
    """What the policy takes and gives, to be looked at: a wrong camera or rate is not found out by any check."""
    console, meant = plain_console(), contract.contract
    marked = sum(dimension.relative for dimension in meant.action)
    console.print(f"{out}  {contract.fingerprint[:19]}")
    console.print(f"  {contract.embodiment_tag}, {meant.control_hz:g} Hz, {contract.normalization}")
    console.print(
        f"  state of {len(meant.state)}; chunks of {contract.chunk_length} x {len(meant.action)}, {marked} relative"
    )
    for camera in meant.cameras:
        console.print(f"  {camera.key}: {camera.height} x {camera.width}, called {camera.label!r}")
