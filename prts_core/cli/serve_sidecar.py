"""`prts serve --sidecar FAMILY`: a server of somebody else's as our child, behind our keys, limits and protocols."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from prts_core.io.errors import ServeError

if TYPE_CHECKING:
    from prts_core.serving.service import ServerConfig
    from prts_core.serving.sidecar.child import Launch
    from prts_core.serving.sidecar.home import Home
    from prts_core.serving.versions import Version

EPILOG = """
sidecar: RLDX-1's or GR00T's own server, which need another Python, as a child of this one
  prts serve --sidecar rldx --dry-run                 # what would be installed and run; does nothing
  prts serve --sidecar rldx --contract configs/robots/my_robot.yaml --control-hz 20 --protocol both
  prts serve --sidecar gr00t --model DIR --embodiment-tag NEW_EMBODIMENT --contract policy_contract.json
  Its numbers are those of --contract; --groot-key puts them under the server's keys, --camera its cameras.
  docs/how-to/sidecar.md says the rest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sidecar", "a server in a Python of its own, started and ended by this one")
    add = group.add_argument
    add("--sidecar", choices=("rldx", "gr00t"), help="serve through that family's own server")
    add(
        "--contract",
        type=Path,
        metavar="FILE",
        help="what its numbers mean: a policy's or dataset's contract, or a robot's YAML",
    )
    add("--control-hz", type=float, metavar="HZ", help="control rate, for a robot's YAML")
    add(
        "--image-size",
        default="256x256",
        metavar="HxW",
        help="of its cameras, for a robot's YAML (default: %(default)s)",
    )
    add("--embodiment-tag", metavar="TAG", help="of the checkpoint (default: GENERAL_EMBODIMENT, NEW_EMBODIMENT)")
    add(
        "--quantization",
        choices=("none", "nf4", "int8"),
        default="none",
        help="of its linear layers, but for the action head (default: %(default)s)",
    )
    add(
        "--sidecar-rtc",
        choices=("none", "trained", "guided"),
        default="none",
        help="rldx: the server goes on from the chunk before by itself, in each session (default: %(default)s)",
    )
    add("--sidecar-rtc-delay", type=int, metavar="ROWS", help="rows executed until an answer is here")
    add("--sidecar-rtc-horizon", type=int, metavar="ROWS", help="rows executed between two looks (default: the rest)")
    add("--sidecar-port", type=int, metavar="PORT", help="where it listens on this machine (default: by what it is)")
    add(
        "--sidecar-boot-timeout",
        type=float,
        default=900.0,
        metavar="S",
        help="from its start to its first answer (default: %(default)g)",
    )
    add(
        "--sidecar-trust",
        action="store_true",
        help="use a server that is found running and that no identity file vouches for",
    )
    add("--sidecar-python", type=Path, metavar="FILE", help="its Python, where you installed it yourself")
    add("--sidecar-script", type=Path, metavar="FILE", help="its server's script, with --sidecar-python")
    add("--dry-run", action="store_true", help="print what would be installed and run, and do nothing")


def check(args: argparse.Namespace) -> None:
    """ServeError for arguments that do not go together. Fills in the model that the family serves by default."""
    if args.sidecar is None:
        plain = argparse.ArgumentParser()
        add_arguments(plain)
        told = [name for name, default in vars(plain.parse_args([])).items() if getattr(args, name) != default]
        if told or args.model is None:
            raise ServeError(
                "This needs a sidecar" if told else "Nothing is named that could be served",
                field=", ".join("--" + name.replace("_", "-") for name in told) or "--model",
                expected="--sidecar rldx or gr00t" if told else "--model PACKAGE, or --sidecar rldx",
            )
        return
    lacking = {
        "--follow": args.follow,
        "--value": args.value,
        "--best-of": args.best_of > 1,
        "--require-signature": args.require_signature,
        "--devices": args.devices != (None,),
    }
    if told := [name for name, given in lacking.items() if given]:
        raise ServeError(
            "A sidecar has no versions, no value, no signatures and one device of its own",
            field=", ".join(told),
            cure="leave it out",
        )
    if (args.sidecar_python is None) != (args.sidecar_script is None):
        raise ServeError(
            "A server that you installed yourself is its Python and its script",
            field="--sidecar-python, --sidecar-script",
            found="one of the two",
            expected="both, or neither",
        )
    if args.contract is None and not args.dry_run:
        raise ServeError(
            "Nobody says what the numbers mean: servers of this protocol tell no widths and no units",
            field="--contract",
            expected="a policy_contract.json, a contract.json, or a robot's YAML",
        )
    args.model = launch_of(args)[0].server.model


def launch_of(args: argparse.Namespace) -> tuple[Launch, Home | None]:
    """(how the server is started, where it is installed unless the user says that it is elsewhere)."""
    from prts_core.serving.sidecar.child import Launch
    from prts_core.serving.sidecar.families import Server
    from prts_core.serving.sidecar.home import Home

    server = Server.of(
        args.sidecar,
        args.model,
        args.embodiment_tag,
        args.sidecar_port,
        args.quantization,
        args.sidecar_rtc,
        args.sidecar_rtc_delay,
        args.sidecar_rtc_horizon,
    )
    home = Home(args.sidecar) if args.sidecar_python is None else None
    if home is None:
        python, script = args.sidecar_python.expanduser().absolute(), args.sidecar_script.expanduser().resolve()
        if not python.is_file() or not script.is_file():
            lacking = python if not python.is_file() else script
            raise ServeError("There is no such file", field="--sidecar-python, --sidecar-script", found=str(lacking))
        revision = str(script)
    else:
        python, script, revision = home.python, home.source / server.family.script, server.family.revision
    without = (args.api_key_env,)
    launch = Launch(server, python, script, revision, without, args.sidecar_boot_timeout, args.sidecar_trust)
    return launch, home


def dry_run(args: argparse.Namespace) -> int:
    from prts_core.serving.sidecar.plan import plan

    print(plan(*launch_of(args)))
    return 0


@contextlib.contextmanager
def opened(args: argparse.Namespace, config: ServerConfig) -> Iterator[Version]:
    """The policy behind the sidecar, installed and started where it must be, and ended with the context."""
    from prts_core.io.files import digest_value
    from prts_core.serving.sidecar.contract import StatedContract
    from prts_core.serving.sidecar.home import install
    from prts_core.serving.sidecar.plan import ask_weights
    from prts_core.serving.sidecar.policy import SidecarPolicy
    from prts_core.serving.sidecar.supervisor import Sidecar
    from prts_core.serving.versions import Version

    launch, home = launch_of(args)
    for note in ask_weights(launch.server).notes:
        print(note, file=sys.stderr)
    stated = StatedContract(args.contract, args.control_hz, _size(args.image_size))
    if home is not None:
        install(launch.server, home)
    told = {k: v for k, v in asdict(launch.identity(0)).items() if k not in ("pid", "port", "host", "started")}
    with Sidecar(launch) as sidecar:
        policy = SidecarPolicy(sidecar, stated, config.groot_keys, config.aliases, config.request_timeout_s)
        with contextlib.closing(policy):
            yield Version(args.sidecar, policy, digest_value(told))


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise ServeError("This is no size of pictures", field="--image-size", found=text, expected="HEIGHTxWIDTH")
    return int(height), int(width)
