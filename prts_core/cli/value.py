"""`prts value` on any policy and dataset: curves with frames under them, or the episodes ranked. Prints and draws.

Without --policy it is the stage.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from prts_core.cli.main import add_dtype_argument, table
from prts_core.io.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from prts_core.config.model import PolicyDtype
    from prts_core.contract import PolicyContract
    from prts_core.data.lerobot_v21.reader import LeRobotDataset
    from prts_core.policy.policy import Policy
    from prts_core.value.ranking import Measured, Ranking, RankingVerdict

EPISODES, CURVE_ROWS, SENTENCES = 6, 120, 12  # drawn where none are named; rows a curve; other sentences asked
SHOWN = 20  # rows of the table on screen
EPILOG = """\
With --policy and --data this is a tool and runs no stage:

  prts value --policy models:/prts-quickstart@champion --data outputs/runs/quickstart/convert/metaworld/output
      curves of a few held-out episodes under every sentence of the dataset, with frames under them: value.png
  prts value --policy P --data D --episode 3 --episode 7 --instruction "open the faucet" --instruction "wave"
      these episodes under these sentences, whether or not the dataset knows them
  prts value --policy P --data D --rank
      all episodes, worst first: value that falls (reversed), does not move (frozen), fits another sentence better
      (mislabelled); the picture shows the worst ones over the band of their peers. Interrupted, it goes on.

Values are nats: exp(scale) phi(s, a) . psi(l) = log of the discounted chance to reach the goal, up to a constant of the
sentence. Along a good demonstration they rise by about -log gamma a row. The numbers are JSON beside the picture.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool = parser.add_argument_group("as a tool")
    tool.add_argument(
        "--policy", metavar="POLICY", help="a policy or package folder, models:/<name>@<alias> or /<version>"
    )
    tool.add_argument("--data", type=Path, metavar="FOLDER", help="a LeRobot dataset, v2.1 to v3.1")
    tool.add_argument(
        "--episode",
        type=int,
        action="append",
        metavar="N",
        dest="episodes",
        help="which episode; may be repeated (default: a few held-out ones; with --rank: all)",
    )
    tool.add_argument(
        "--instruction",
        action="append",
        metavar="TEXT",
        dest="instructions",
        help="under which sentence; may be repeated (default: the dataset's own)",
    )
    tool.add_argument("--camera", metavar="KEY", help="whose frames are drawn (default: the policy's first)")
    add_dtype_argument(tool)
    tool.add_argument("--rank", action="store_true", help="rank the episodes and flag bad demonstrations")
    tool.add_argument(
        "--out", type=Path, metavar="PNG", help="the picture (default: value.png, with --rank ranking.png)"
    )


def main(args: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    for name in ("policy", "data"):
        if getattr(args, name) is None:
            raise ConfigError(
                "Value as a tool needs a policy and a dataset",
                field=f"--{name}",
                found="nothing",
                cure="give both --policy and --data, or neither to run the stage; `prts value --help` shows examples",
            )
    out = args.out or Path("ranking.png" if args.rank else "value.png")
    if out.suffix != ".png":
        raise ConfigError("The picture is a PNG", field="--out", found=str(out), expected=f"{out.with_suffix('.png')}")
    from prts_core.data.lerobot_v21.reader import LeRobotDataset

    dataset = LeRobotDataset.open(args.data)
    episodes = choose_episodes(dataset, args.episodes, args.rank)
    folder, policy = open_policy(args.policy, args.outputs, args.dtype)
    require_fits(dataset, policy.contract, args.data, console)
    cameras = [camera.key for camera in policy.contract.contract.cameras]
    camera = args.camera or cameras[0]
    if camera not in dataset.camera_keys:
        raise DataError(
            f"The dataset has no camera {camera!r}{suggest(camera, dataset.camera_keys)}",
            field="--camera",
            expected=", ".join(dataset.camera_keys),
        )
    sentences = choose_sentences(dataset, args.instructions, args.rank)
    draw = rank_episodes if args.rank else draw_curves
    draw(policy, folder, dataset, episodes, sentences, camera, out, console)
    console.print(f"{out}  {out.with_suffix('.json')}", highlight=False, markup=False)
    return 0


# ---- what is asked -----------------------------------------------------------------------------------------------
def open_policy(reference: str, outputs: Path, dtype: PolicyDtype) -> tuple[Path, Policy]:
    """The policy of a folder (a package is verified first) or of a registered model."""
    from prts_core.delivery.resolve import policy_folder
    from prts_core.policy.policy import load_policy

    folder = policy_folder(reference, outputs)
    return folder, load_policy(folder, dtype)


def choose_episodes(dataset: LeRobotDataset, named: list[int] | None, rank: bool) -> list[int]:
    from prts_core.value.curves import one_of_each

    if named:
        wrong = [episode for episode in named if not 0 <= episode < len(dataset.rows)]
        if wrong:
            raise DataError(
                "No such episode",
                file=dataset.root,
                field="--episode",
                found=wrong[0],
                expected=f"0 to {len(dataset.rows) - 1}",
            )
        return list(dict.fromkeys(named))
    if rank:
        return dataset.episodes()
    heldout = dataset.episodes("heldout") if "heldout" in dataset.info.split_ranges else []
    return one_of_each(dataset, heldout or dataset.episodes(), EPISODES)[:EPISODES]


def choose_sentences(dataset: LeRobotDataset, named: list[str] | None, rank: bool) -> list[str]:
    """The sentences named, or the commonest of the dataset. For a ranking they come on top of the dataset's."""
    from collections import Counter

    blank = [text for text in named or [] if not text.strip()]
    if blank:
        raise ConfigError("An instruction is empty", field="--instruction", found=blank[0])
    if named and not rank:
        return list(dict.fromkeys(named))
    common = Counter(dataset.instruction(episode) for episode in dataset.episodes()).most_common(SENTENCES)
    return list(dict.fromkeys([*(text for text, _ in common), *(named or [])]))


def require_fits(dataset: LeRobotDataset, contract: PolicyContract, path: object, console: Console) -> None:
    """The dataset's contract is the policy's; a dataset that was never imported has none, and is told so."""
    from prts_core.contract import require_equal

    if (dataset.root / "meta" / "contract.json").exists():
        require_equal(dataset.contract, contract.contract, left_name=f"dataset {path}", right_name="policy")
        return
    lacking = [c.key for c in contract.contract.cameras if c.key not in dataset.camera_keys]
    if lacking:
        raise DataError(
            "The dataset lacks a camera of the policy",
            file=path,
            field=lacking[0],
            found=", ".join(dataset.camera_keys),
        )
    console.print(
        "[yellow]note:[/] the dataset has no meta/contract.json: cameras and widths are compared with the policy's, "
        "units and order are not (`prts convert` writes one)",
        highlight=False,
    )


# ---- curves ------------------------------------------------------------------------------------------------------
def draw_curves(
    policy: Policy,
    folder: Path,
    dataset: LeRobotDataset,
    episodes: list[int],
    sentences: list[str],
    camera: str,
    out: Path,
    console: Console,
) -> None:
    from prts_core.io.files import write_json
    from prts_core.io.progress import track
    from prts_core.policy.policy import policy_digest
    from prts_core.value.curves import episode_curve, spearman, spread_rows
    from prts_core.value.plots import plot_curves

    curves = [
        episode_curve(policy, dataset, episode, sentences, spread_rows(dataset.length(episode), CURVE_ROWS))
        for episode in track(episodes, what="value curves")
    ]
    plot_curves(out, curves, dataset, camera, "Goal-reachability value, own sentence bold")
    figures = ("first", "last", "nats/s", "Spearman")
    shown = table("episode", "sentence", *figures, right=("episode", *figures))
    rows = []
    for curve in curves:
        seconds = max(float(curve.rows[-1] - curve.rows[0]), 1.0) / dataset.fps
        for text, values in zip(curve.instructions, curve.values, strict=True):
            first, last = float(values[0]), float(values[-1])
            shown.add_row(
                str(curve.episode),
                Text(text, "bold" if text == curve.own else ""),
                f"{first:.2f}",
                f"{last:.2f}",
                f"{(last - first) / seconds:+.2f}",
                f"{spearman(values):+.2f}",
            )
        rows.append(
            {
                "episode": curve.episode,
                "own": curve.own,
                "rows": curve.rows.tolist(),
                "values": {
                    text: [round(float(v), 4) for v in values]
                    for text, values in zip(curve.instructions, curve.values, strict=True)
                },
            }
        )
    console.print(shown)
    write_json(
        out.with_suffix(".json"),
        {
            "policy_digest": policy_digest(folder),
            "dtype": policy.dtype,
            "fps": dataset.fps,
            "unit": "nats",
            "curves": rows,
        },
    )


# ---- ranking -----------------------------------------------------------------------------------------------------
def rank_episodes(
    policy: Policy,
    folder: Path,
    dataset: LeRobotDataset,
    episodes: list[int],
    sentences: list[str],
    camera: str,
    out: Path,
    console: Console,
) -> None:
    from prts_core.io.files import digest_file, digest_value, write_json
    from prts_core.policy.policy import policy_digest
    from prts_core.value.plots import plot_ranking
    from prts_core.value.ranking import rank

    digest = policy_digest(folder)
    described = {path.name: digest_file(path) for path in sorted((dataset.root / "meta").glob("*.json*"))}
    key = digest_value([digest, policy.dtype, described, sentences])
    partial = out.with_suffix(f".{key[len('sha256:') :][:12]}.partial.jsonl")
    measured = measure_all(policy, dataset, episodes, sentences, partial, key)
    ranking = rank(measured)
    show_ranking(ranking, console)
    plot_ranking(out, ranking, measured, dataset, camera)
    write_json(
        out.with_suffix(".json"),
        {
            "policy_digest": digest,
            "dtype": policy.dtype,
            "sentences": sentences,
            **ranking.to_json(),
            "measured": [asdict(m) for m in measured],
        },
    )
    partial.unlink(missing_ok=True)


def measure_all(
    policy: Policy, dataset: LeRobotDataset, episodes: list[int], sentences: list[str], partial: Path, key: str
) -> list[Measured]:
    """Measurements of all episodes; those that an interrupted run left in `partial` are not made again."""
    from prts_core.io.journal import Journal
    from prts_core.io.progress import track
    from prts_core.value.ranking import Measured, measure, state_scale

    scale = state_scale(dataset, episodes)
    with Journal(partial, {"ranking": key}, ("episode",)) as journal:
        for episode in track([episode for episode in episodes if (episode,) not in journal.rows], what="ranking"):
            journal.add(asdict(measure(policy, dataset, episode, sentences, scale)))
        return [Measured(**journal.rows[(episode,)]) for episode in sorted(episodes)]


def show_ranking(ranking: Ranking, console: Console) -> None:
    figures = ("episode", "score", "Spearman", "rise", "margin")
    worst = table(
        *figures, "sentence", "flag", right=figures, title="worst first", title_justify="left", title_style="dim"
    )
    flagged = ranking.flagged
    lowest = [verdict for verdict in ranking.verdicts if not verdict.flag][: max(3, SHOWN - len(flagged))]
    for verdict in [*flagged[:SHOWN], *lowest]:
        worst.add_row(*_cells(verdict))
    console.print(worst)
    if len(flagged) > SHOWN:
        console.print(f"... and {len(flagged) - SHOWN} more flagged, in the JSON", style="dim")
    for sentence, why in ranking.unsure.items():
        console.print(Text(f"unsure of {sentence!r}: {why}", style="yellow"))
    colour = "yellow" if flagged else "green"
    console.print(f"[{colour}]{len(flagged)} of {len(ranking.verdicts)} demonstrations are flagged[/]", highlight=False)


def _cells(verdict: RankingVerdict) -> list[Any]:
    flag = f"{verdict.flag.reason}: {verdict.flag.detail}" if verdict.flag else ""
    return [
        str(verdict.episode),
        f"{verdict.score:+.2f}",
        f"{verdict.spearman:+.2f}",
        f"{verdict.rise:+.2f}",
        "-" if verdict.margin is None else f"{verdict.margin:+.2f}",
        Text(verdict.instruction),
        Text(flag, style="yellow"),
    ]
