"""`prts replay`: how far a policy's actions are from recorded ones, or from those of a policy that drives a robot now.

It prints and decides nothing: what is measured is prts_core/rollout/replay.py's and prts_core/serving/shadow.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from prts_core.cli.main import add_dtype_argument, add_plan_arguments, plain_console, table, wide_console
from prts_core.io.errors import ConfigError, DataError

if TYPE_CHECKING:
    from prts_core.contract import Contract
    from prts_core.data.lerobot_v21.reader import LeRobotDataset
    from prts_core.rollout.local_policy import PolicyUnderTest

SERVERS = ("ws://", "wss://")
EPILOG = """\
recorded episodes
  prts replay metaworld --policy models:/prts-quickstart@champion
      the held-out episodes of a recipe's dataset (all, where none are held out): a chunk is asked for after every
      chunk, and each of its actions compared with the recorded one of that moment
  prts replay ~/data/mine --policy outputs/runs/quickstart/package/output --episode 3 --episode 7 --every 1
      these episodes of a LeRobot folder, v2.1 to v3.1, looking at every row
  prts replay metaworld --policy ws://gpu:8000 --json
      through the policy that is served there; the report on standard output

  The error is told by dimension, in its unit, and by row of the chunk: how far ahead a row is. A spread is the standard
  deviation of the recorded numbers; an RMSE of one spread is what the mean action would have. The same policy, episodes
  and options again print the finished report and ask nothing; an interrupted replay goes on.

beside a robot that is driven by another policy
  prts replay --shadow ws://gpu:8000 --policy models:/prts-quickstart@challenger --port 8100
      the robot connects to port 8100 in place of 8000. Every message passes unchanged, both ways; the challenger is
      asked the same in a thread of its own and commands nothing. Ctrl-C ends it and prints how far its actions were
      from the live ones. Where it cannot keep up, requests are left out and counted. A shadow that is loaded here
      shares this machine's processors with the proxy: serve it elsewhere, and name its ws:// address, where that
      matters.

A small error says that the policy does what was done in places where the demonstrator, or the live policy, was. How far
it gets on its own only a closed loop says: prts benchmark.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="?", metavar="DATASET", help="a dataset of the recipe, or a LeRobot folder")
    parser.add_argument(
        "--policy",
        required=True,
        help="a policy or package folder, models:/<name>@<alias> or /<version>, or ws://host:port of a policy server",
    )
    which = parser.add_argument_group("recorded episodes")
    which.add_argument("--episode", type=int, action="append", dest="episodes", metavar="N", help="may be repeated")
    which.add_argument("--split", metavar="NAME", help="episodes of this split (default: heldout, or all)")
    which.add_argument("--every", type=int, metavar="K", help="rows between two looks (default: a chunk)")
    which.add_argument("--seed", type=int, default=0, help="of the policy's noise (default: %(default)s)")
    which.add_argument(
        "--contract",
        metavar="C",
        help="what the numbers of an openpi server mean that does not say so: dataset (as the dataset's own), a "
        "policy's folder, or a contract's file",
    )
    which.add_argument("--batch", type=int, metavar="N", help="looks asked at once (default: 1; 8 on a GPU)")
    beside = parser.add_argument_group("beside a robot")
    beside.add_argument("--shadow", metavar="URL", help="the server that the robot is driven by, ws://host:port")
    beside.add_argument(
        "--host",
        default="127.0.0.1",
        help="to listen on; other than this machine's own needs a key there (%(default)s)",
    )
    beside.add_argument("--port", type=int, default=8100, help="0 takes any free one (default: %(default)s)")
    beside.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="CLIENT_KEY=CAMERA",
        help="another name for a camera, as given to the live server; may be repeated",
    )
    beside.add_argument("--live-key-env", metavar="NAME", help="variable with its key (default: as --api-key-env)")
    add_dtype_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a folder below <outputs>/replay")
    parser.add_argument("--patience", type=float, default=60.0, metavar="S", help="seconds a server may be away")
    parser.add_argument(
        "--api-key-env", default="PRTS_API_KEY", metavar="NAME", help="variable with the server's key (%(default)s)"
    )
    add_plan_arguments(parser)


def main(args: argparse.Namespace) -> int:
    if (args.dataset is None) == (args.shadow is None):
        raise ConfigError(
            "Either recorded episodes are replayed, or a robot is accompanied",
            field="DATASET, --shadow",
            found="neither" if args.dataset is None else "both",
            expected="one of them",
            cure="`prts replay --help` shows examples",
        )
    if args.shadow is not None:
        return accompany(args)
    from prts_core.cli.benchmark import default_batch
    from prts_core.cli.value import require_fits
    from prts_core.delivery.open_policy import identify
    from prts_core.io.files import digest_value
    from prts_core.rollout.replay import finished, replay, replay_header

    note = plain_console(stderr=True)
    dataset, name = open_dataset(args)
    args.batch = default_batch(args)
    policy: PolicyUnderTest | None = None
    try:
        if args.policy.startswith(SERVERS):
            policy = opened(args, stated_contract(args.contract, dataset))
            identity, contract = policy.identity, policy.contract
        else:
            identity, contract = identify(args.policy, outputs=args.outputs, dtype=args.dtype)
        require_fits(dataset, contract, dataset.root, Console(stderr=True, soft_wrap=True))
        episodes = chosen_episodes(dataset, args)
        options = {"every": args.every, "seed": args.seed, "batch": args.batch}
        header = replay_header(identity, dataset, episodes, contract, **options)
        folder = args.output or args.outputs / "replay" / digest_value(header).removeprefix("sha256:")[:16]
        report = finished(folder, header)
        if report is None:
            policy = policy or opened(args, stated_contract(args.contract, dataset))
            report = replay(policy, dataset, header, folder)
        else:
            note.print("found finished; nothing was asked")
        if not (folder / "page.html").is_file():
            known = ", ".join(f"{key} {value}" for key, value in sorted(identity.items()) if value)
            write_page(folder, report, f"Replay of {name}", [f"policy: {known}", f"dataset: {header['dataset']}"])
    finally:
        if policy is not None:
            policy.close()
    tell_report(report, args.json, folder)
    return 0


# ---- what is asked -----------------------------------------------------------------------------------------------
def open_dataset(args: argparse.Namespace) -> tuple[LeRobotDataset, str]:
    """The dataset and what to call it: a folder or URL, or the converted one of a recipe's dataset."""
    from prts_core.config.load import load_plan
    from prts_core.data.lerobot_v21.reader import LeRobotDataset
    from prts_core.io.object_storage import is_url
    from prts_core.stages.chain import finished

    if is_url(args.dataset):
        return LeRobotDataset.open(args.dataset), args.dataset
    if (path := Path(args.dataset).expanduser()).is_dir():
        return LeRobotDataset.open(path), path.name
    if os.sep in args.dataset:
        raise DataError("There is no such folder", field="DATASET", found=args.dataset, expected="a LeRobot dataset")
    plan = load_plan(args.config, args.overrides)
    plan.dataset(args.dataset)
    return LeRobotDataset.open(finished("convert", plan, args.dataset, args.outputs).folder(args.outputs)), args.dataset


def chosen_episodes(dataset: LeRobotDataset, args: argparse.Namespace) -> list[int]:
    from prts_core.cli.value import choose_episodes

    if args.episodes and args.split:
        raise ConfigError("Episodes are named twice", field="--episode, --split", expected="one of them")
    if args.episodes:
        return choose_episodes(dataset, args.episodes, True)
    if args.split:
        return dataset.episodes(args.split)
    heldout = dataset.episodes("heldout") if "heldout" in dataset.info.split_ranges else []
    return heldout or dataset.episodes()


def stated_contract(reference: str | None, dataset: LeRobotDataset) -> Contract | None:
    """What the user says the numbers of a server mean."""
    from prts_core.rollout.remote_policy import named_contract

    if reference is None:
        return None
    return dataset.contract if reference == "dataset" else named_contract(reference, dataset.contract)


def opened(args: argparse.Namespace, contract: Contract | None = None) -> PolicyUnderTest:
    from prts_core.delivery.open_policy import open_policy

    return open_policy(
        args.policy,
        batch=args.batch,
        values=False,
        patience_s=args.patience,
        api_key=os.environ.get(args.api_key_env) or None,
        outputs=args.outputs,
        dtype=args.dtype,
        contract=contract,
    )


# ---- beside a robot ----------------------------------------------------------------------------------------------
def accompany(args: argparse.Namespace) -> int:
    from prts_core.cli.serve import _pairs
    from prts_core.io.files import write_json
    from prts_core.serving.shadow import Shadow, live_metadata, proxy, require_comparable

    if not args.shadow.startswith(SERVERS):
        raise ConfigError(
            "Only a server of openpi's protocol can be accompanied",
            field="--shadow",
            found=args.shadow,
            expected="ws://host:port",
        )
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    note = plain_console(stderr=True)
    aliases = _pairs("--camera client_key=camera", args.camera, "observation/image=observation.images.top")
    args.batch = 1
    policy = opened(args)
    try:
        key = os.environ.get(args.live_key_env or args.api_key_env) or None
        live = live_metadata(args.shadow, key, args.host)
        require_comparable(live, policy.contract, args.shadow)
        with Shadow(policy, aliases) as shadow:

            def ready(port: int) -> None:
                host = f"[{args.host}]" if ":" in args.host else args.host
                note.print(f"accompanying {args.shadow}: connect the robot's client to ws://{host}:{port}")

            async def run() -> None:
                stop, loop = asyncio.Event(), asyncio.get_running_loop()
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, stop.set)
                await proxy(shadow, args.shadow, stop, ready, host=args.host, port=args.port)

            asyncio.run(run())
    finally:
        policy.close()
    known = {"live": {name: live.get(name) for name in ("model", "model_version", "package_digest")}}
    report = known | {"shadow": dict(policy.identity)} | shadow.report()
    folder = args.output or args.outputs / "replay" / "shadow"
    write_json(folder / "report.json", report)
    counts = f"{shadow.asked} requests, {shadow.dropped} left out, {shadow.failed} failed"
    write_page(folder, report, f"{args.policy} beside {args.shadow}", [counts, *([shadow.why] if shadow.why else [])])
    note.print(counts)
    if shadow.why:
        note.print(f"the first fault: {shadow.why}", style="yellow")
    tell_report(report, args.json, folder)
    return 0


# ---- what is told ------------------------------------------------------------------------------------------------
def write_page(folder: Path, report: dict[str, Any], title: str, about: list[str]) -> None:
    from prts_core.rollout.replay_page import write_replay_page

    write_replay_page(folder / "page.html", report, title, about)


def tell_report(report: dict[str, Any], as_json: bool, folder: Path) -> None:
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    from prts_core.rollout.replay_page import rows_shown

    places = rows_shown(report)
    ahead = [f"at +{report['rows'][place]['seconds']:.2f} s" for place in places]
    figures, told = ("mean |error|", "RMSE", "largest", "spread"), f"{report['looks']} chunks compared"
    shown = table("dimension", "unit", *figures, *ahead, right=(*figures, *ahead), title=told)
    for one in report["dimensions"]:
        numbers = [one["mean"], one["rmse"], one["largest"], one["spread"], *(one["by_row"][place] for place in places)]
        shown.add_row(Text(one["name"]), Text(one["unit"]), *(f"{number:.4g}" for number in numbers))
    wide_console().print(shown)
    plain_console().print(f"{folder / 'report.json'}  {folder / 'page.html'}")
