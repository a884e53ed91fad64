"""Write a policy of ours as a checkpoint folder that the public PRTS code loads: `prts export-policy`."""

from __future__ import annotations

import argparse
from pathlib import Path

from prts_core.cli.main import add_outputs_argument, plain_console

EPILOG = """\
examples
  prts export-policy models:/prts-libero@champion --like checkpoints/libero --out released/libero
      a policy that was fine-tuned from a released checkpoint (sft.checkpoint), with the fields and files of that
      checkpoint which are not ours to know (--like); in the public code, and imported again, it acts as it does here
  prts export-policy outputs/runs/pretrain_4b/pretrain/output --start --dtype bf16 --out released/base
      weights and tokens alone, for the public post-training to start from

The folder gets config.json, *.safetensors, the tokenizer, statistics.json and, in fast/, the FAST processor. The public
layout has no place for the control rate, units, marks of relative actions and the tokens of a view: `prts
import-policy` asks for them. It holds no policy of other numerics than the release's (compat: none), no subtasks, no
letterboxed views, and of the mixture-of-transformers head only the sizes that the public code fixes; what stands in the
way is told in one error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "policy", help="a policy or package folder, models:/<name>@<alias>, or (--start) what stage pretrain wrote"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must not exist")
    parser.add_argument(
        "--like", metavar="CHECKPOINT", help="the released one that training started from, folder or hub id"
    )
    parser.add_argument("--dataset", metavar="REPO_ID", help="its name in statistics.json (default: the embodiment)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights (default: as they lie)")
    parser.add_argument("--start", action="store_true", help="weights and tokens alone, to train on from")
    parser.add_argument(
        "--overrides",
        action="store_true",
        help="write sizes that the public code fixes in its source, for a patched copy of it",
    )
    add_outputs_argument(parser, "whose registry models:/ means")


def main(args: argparse.Namespace) -> int:
    from prts_core.delivery.resolve import policy_folder
    from prts_core.io.files import new_folder
    from prts_core.release.export import export_policy

    with new_folder(args.out) as partial:
        made = export_policy(
            policy_folder(args.policy, args.outputs),
            partial,
            like=args.like,
            dataset=args.dataset,
            dtype=args.dtype,
            start=args.start,
            overrides=args.overrides,
        )
    console = plain_console()
    console.print(f"{args.out}  {'a policy' if made.acts else 'a start for training'}")
    if made.rounded:
        console.print(
            f"  norms of the language model were rounded to bf16, as the public code does at loading (by up to "
            f"{made.rounded:.1e} of their size)"
        )
    return 0
