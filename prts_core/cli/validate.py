"""`prts validate <folder>` on any LeRobot dataset: print what is wrong, seal it, or repair one of v2.1 into a new one.

Without a folder it is the stage.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from prts_core.cli.main import plain_console
from prts_core.io.errors import ConfigError

if TYPE_CHECKING:
    from prts_core.data.validation.report import Finding

SHOWN = 30  # findings on screen; --json has all
EPILOG = """\
With a folder this is a tool and runs no stage:

  prts validate ~/data/my_dataset                 every fault: file, row, what was found, what to do
  prts validate ~/data/my_dataset --json          the same for machines, on standard output
  prts validate ~/data/my_dataset --video packets quickly: frames are counted, none is decoded
  prts validate ~/data/my_dataset --statistics outputs/runs/my_recipe/stats/my_dataset/output
                                                  are these statistics still of this data? (those in meta/ always)
  prts validate ~/data/my_dataset --seal          write meta/prts_manifest.json (size and SHA-256 of every file), once
                                                  nothing else is wrong; later validations then notice any changed byte
  prts validate ~/data/my_dataset --fix OUT       a new dataset OUT, put right where a machine can: totals, numbering,
                                                  splits, missing statistics, order of rows; episodes that cannot be
                                                  saved are left out and listed in OUT/meta/quarantine.jsonl

Exit status: 0 sound (warnings allowed), 1 errors. With --fix it is the verdict on OUT. The folder itself is never
changed, but for the manifest that --seal writes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tool = parser.add_argument_group("as a tool")
    tool.add_argument("folder", nargs="?", type=Path, help="a LeRobot dataset, v2.1 to v3.1")
    tool.add_argument("--json", action="store_true", help="print the report as JSON")
    tool.add_argument("--seal", action="store_true", help="write the manifest of a dataset without errors")
    tool.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy; OUT must not exist")
    tool.add_argument(
        "--link", choices=("copy", "hardlink"), default="copy", help="how --fix takes files over (default: %(default)s)"
    )
    tool.add_argument(
        "--video",
        choices=("every", "ends", "packets"),
        default="every",
        help="decode every frame, the first and last, or none (default: %(default)s)",
    )
    tool.add_argument(
        "--statistics",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="statistics that must be this dataset's: a file, or a folder such as stage stats makes (repeatable)",
    )
    tool.add_argument("--workers", type=int, help="threads (default: one a core)")


def main(args: argparse.Namespace) -> int:
    from prts_core.data.lerobot_v21.seal import seal
    from prts_core.data.validation import validate_dataset

    if args.folder is None:
        raise ConfigError(
            "Validation as a tool needs a dataset",
            field="folder",
            found="nothing",
            cure="prts validate FOLDER; `prts validate --help` shows examples",
        )
    workers = args.workers or os.cpu_count() or 2
    console = plain_console(stderr=args.json)
    if args.fix is not None:
        from prts_core.data.validation.repair import repair

        done = repair(args.folder, args.fix, link=args.link, video=args.video, workers=workers)
        for line in done:
            console.print(line)
    root = args.folder if args.fix is None else args.fix
    report = validate_dataset(
        root, args.video, workers=workers, foreign=True, sealed=not args.seal, statistics=args.statistics
    )
    if args.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        verdict = "sound" if report.ok else f"{len(report.errors)} errors"
        console.print(f"{root}: {verdict}, {len(report.warnings)} warnings")
        if report.findings:
            console.print(*map(_lines, [*report.errors, *report.warnings][:SHOWN]), sep="\n")
        if len(report.findings) > SHOWN:
            console.print(f"... and {len(report.findings) - SHOWN} more: --json shows all")
    if args.seal and report.ok:
        console.print(f"sealed: {seal(root, workers)}")
    elif args.seal:
        console.print("not sealed: correct the errors first, or use --fix", style="red")
    return 0 if report.ok else 1


def _lines(finding: Finding) -> Text:
    """One finding: where, what, what it should be; under it the cure."""
    where = finding.file if finding.row is None else f"{finding.file}, row {finding.row}"
    colour = "red" if finding.severity == "error" else "yellow"
    text = Text.assemble((f"{finding.severity:7s}", colour), f" {finding.check}: ", (where, "bold"))
    text.append(f"\n        {finding.found}; expected {finding.expected}")
    return text.append(f"\n        cure: {finding.cure}", "dim")
