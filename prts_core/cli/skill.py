"""`prts skill`: look a skill package over, sign it, install it, find one by what it does, begin a new one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.cli import skill_package
from prts_core.cli.main import plain_console, table, tell, wide_console

if TYPE_CHECKING:
    from prts_core.skills.registry import Installed
    from prts_core.skills.review import Review
    from prts_core.skills.search import Found

EPILOG = """\
examples
  prts skill check packages/my-skill             is the manifest sound, may it be installed, are its results its own?
  prts skill check my-skill --robot robot.yaml   and does it fit this robot? (a folder, a file, or an installed skill)
  prts skill install packages/my-skill           from a folder
  prts skill install hf://owner/name@revision    from the hub: manifest and licence first, then weights
  prts skill install rskill://pi05-libero-nf4    a public skill by its short name
  prts skill list                                what is installed
  prts skill search pick bowl --robot robot.yaml what could pick a bowl on this robot
  prts skill search drawer --in packages         also among the packages of a folder
  prts skill new my-skill                        a template to fill in
  prts skill remove owner/name
  prts skill pack policies/libero --name me/libero --out packages/libero
                                                 a package of any policy folder, such as `prts import-policy` writes
  prts skill quantize packages/libero --as nf4 --out packages/libero-nf4 --config configs/libero_object.yaml
  prts skill keygen keys/me.pem                  a key pair: keys/me.pem (keep it to yourself) and keys/me.pub.pem
  prts skill sign my-skill --key keys/me.pem     list its files' digests in digests.json and sign the list
  prts skill verify my-skill --trusted keys      are its files, weights and results those that one of these keys signed?

`prts package` is the stage that makes a package of a recipe's policy; what is done to any package is done here.
Exit status of check: 1 where anything failed; "unknown" (the robot's file does not say) is no failure.
Licences: a skill that is not for commercial use is refused, unless --non-commercial is given or
OPENRAL_ALLOW_NONCOMMERCIAL is 1. Skills lie in $XDG_DATA_HOME/prts/skills (~/.local/share/prts/skills).
"""
COLOURS = {"passed": "green", "failed": "red", "unknown": "yellow"}


@dataclass(frozen=True)
class Listing:
    """What `prts skill list` prints."""

    skills: tuple[Installed, ...]

    def to_json(self) -> dict[str, Any]:
        return {"skills": [skill.to_json() | {"package": str(skill.package())} for skill in self.skills]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    check = actions.add_parser("check", help="look a package over, and hold it against robots")
    check.add_argument("package", help="a package's folder, its rskill.yaml, or an installed skill")
    install = actions.add_parser("install", help="install a package for this user")
    install.add_argument("source", help="a folder, hf://owner/name[@revision], or rskill://name")
    listing = actions.add_parser("list", help="what is installed")
    search = actions.add_parser("search", help="find skills by what they do")
    search.add_argument("words", nargs="*", help="all of them must stand in name, description, actions, objects, ...")
    search.add_argument(
        "--in",
        dest="trees",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="also among packages below DIR",
    )
    new = actions.add_parser("new", help="write the folder of a new package, to be filled in")
    new.add_argument("folder", type=Path, help="where; must not exist")
    remove = actions.add_parser("remove", help="remove an installed skill")
    remove.add_argument("skill", help="owner/name")
    verify = skill_package.add_actions(actions)
    for sub in (check, install, verify):
        sub.add_argument(
            "--trusted",
            type=Path,
            metavar="KEYS",
            help="a public key (PEM) or a folder of them; one of them must have signed the package",
        )
    for sub in (check, search):
        sub.add_argument(
            "--robot", type=Path, action="append", default=[], metavar="YAML", help="a robot description (repeatable)"
        )
    for sub in (check, install):
        sub.add_argument("--non-commercial", action="store_true", help="the skill is wanted for no commercial use")
    for sub in (check, listing, search):
        sub.add_argument("--json", action="store_true", help="print what was found as one JSON document")


def main(args: argparse.Namespace) -> int:
    return ACTIONS[args.action](args)


def check(args: argparse.Namespace) -> int:
    from prts_core.skills.registry import find
    from prts_core.skills.review import review
    from prts_core.skills.robot import read_robot

    robots = [read_robot(path) for path in args.robot]
    package, as_installed = Path(args.package).expanduser(), {}
    if not package.exists():
        record = find(args.package)
        package, as_installed = record.package(), {"digest": record.digest, "weights": record.weights}
    commercial = not args.non_commercial
    found = review(package, robots, commercial_use=commercial, trusted=args.trusted, **as_installed)
    tell(found, args.json, show_review)
    return 0 if found.ok else 1


def show_review(found: Review) -> None:
    """Print every check with what it found, then the notes."""
    from rich.text import Text

    console = wide_console()
    console.print(Text.assemble((found.name, "bold"), f" {found.version}  {found.kind}, licence {found.licence}"))
    rows = table("", "check", "", "")
    groups = [("package", found.checks), *((robot.robot, robot.checks) for robot in found.robots)]
    for name, checks in groups:
        for number, one in enumerate(checks):
            state = Text(one.state, COLOURS[one.state])
            rows.add_row(Text("" if number else name), one.name, state, Text("\n".join(one.found)))
    console.print(rows)
    for note in found.notes:
        plain_console().print(f"note: {note}", style="yellow")
    verdicts = "; ".join(f"{robot.robot}: {'fits' if robot.ok else 'does not fit'}" for robot in found.robots)
    plain_console().print(verdicts or ("sound" if found.ok else "not to be installed"))


def install(args: argparse.Namespace) -> int:
    from prts_core.skills.registry import install as put

    record, notes = put(args.source, commercial_use=not args.non_commercial, trusted=args.trusted)
    for note in notes:
        plain_console().print(f"note: {note}", style="yellow")
    plain_console().print(f"{record.name} {record.version}: {record.package()}")
    return 0


def list_all(args: argparse.Namespace) -> int:
    from prts_core.skills.registry import installed

    tell(Listing(tuple(installed())), args.json, show_listing)
    return 0


def show_listing(found: Listing) -> None:
    """Print the installed skills as a table."""
    from rich.text import Text

    if not found.skills:
        plain_console().print("no skill is installed; `prts skill install --help`")
        return
    rows = table("skill", "version", "kind", "licence", "robots", "from")
    for skill in found.skills:
        source = skill.source + (f" ({skill.revision[:12]})" if skill.revision else "")
        cells = (skill.name, skill.version, skill.kind, skill.license, ", ".join(skill.embodiment_tags), source)
        rows.add_row(*map(Text, cells))
    wide_console().print(rows)


def search(args: argparse.Namespace) -> int:
    from prts_core.io.errors import ConfigError
    from prts_core.skills.registry import installed
    from prts_core.skills.robot import read_robot
    from prts_core.skills.search import packages_under
    from prts_core.skills.search import search as look

    packages = [record.package() for record in installed()]
    for tree in args.trees:
        if not tree.is_dir():
            raise ConfigError("There is no such folder", field="--in", file=tree, cure="check the path")
        packages += packages_under(tree)
    found = look(args.words, packages, [read_robot(path) for path in args.robot])
    tell(found, args.json, show_found)
    return 0


def show_found(found: Found) -> None:
    """Print what fits as a table, and what could not be read."""
    from rich.text import Text

    if found.skills:
        rows = table("skill", "kind", "actions", "robots", "what it does")
        for skill, _ in found.skills:
            short = skill.description.strip().split(". ")[0]
            cells = (skill.name, skill.kind, ", ".join(skill.actions), ", ".join(skill.embodiment_tags), short)
            rows.add_row(*map(Text, cells))
        wide_console().print(rows)
    else:
        plain_console().print("no skill fits")
    for file, fault in found.unread:
        plain_console().print(f"note: {file} is left out: {fault}", style="yellow")


def new(args: argparse.Namespace) -> int:
    from prts_core.skills.template import write_template

    folder = write_template(args.folder)
    plain_console().print(f"{folder}: replace TEMPLATE_ORG and TEMPLATE_ID, then `prts skill check {folder}`")
    return 0


def remove(args: argparse.Namespace) -> int:
    from prts_core.skills.registry import remove as take

    there = take(args.skill)
    plain_console().print(f"{args.skill}: {'removed' if there else 'not installed'}")
    return 0


ACTIONS = {
    "check": check,
    "install": install,
    "list": list_all,
    "search": search,
    "new": new,
    "remove": remove,
    **skill_package.ACTIONS,
}
