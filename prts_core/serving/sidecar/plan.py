"""Say what serving by a sidecar would install and run on this machine, and do none of it."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass

from prts_core.config.licence import Licence
from prts_core.io.errors import ConfigError
from prts_core.serving.sidecar.child import VARIABLES, Launch
from prts_core.serving.sidecar.families import HOST, Server
from prts_core.serving.sidecar.home import Home, clean_environment, missing_commands
from prts_core.serving.sidecar.identity import Identity
from prts_core.skills.licence import Permission, ask_licence


@dataclass(frozen=True)
class Weights:
    """What the licence gate is asked about."""

    name: str
    license: Licence


def ask_weights(server: Server) -> Permission:
    """The licence gate of skills for these weights: ConfigError where it is shut."""
    return ask_licence(Weights(server.model, server.family.licence))


def plan(launch: Launch, home: Home | None) -> str:
    """A page of text. home: where the server is installed; none where the user named its Python and script."""
    server = launch.server
    rows: list[tuple[str, list[str]]] = [("licence", [server.family.licence_note, _gate(server)])]
    if home is None:
        rows.append(("install", ["nothing: --sidecar-python and --sidecar-script name what is there"]))
    else:
        commands = [str(command) for command in missing_commands(server, home)]
        rows.append(("install", commands or ["nothing: it is installed"]))
        rows.append(("venv", [f"{home.path / 'venv'} (Python {server.family.python})"]))
    hidden = ", ".join(sorted(set(os.environ) - set(clean_environment(launch.without))))
    given = [f"{name}={value}" for name, value in VARIABLES.items()]
    rows += [
        ("environment", [f"this one, without: {hidden or 'nothing that is set here'}; and with", *given]),
        ("run", [shlex.join(launch.command[:2]) + " --parent PID " + shlex.join(launch.command[2:])]),
        ("address", [f"{HOST}:{server.port}"]),
        ("identity", [str(Identity.file(server.port)), _identity(launch)]),
        ("log", [str(launch.log)]),
    ]
    lines = [f"{server.family.title} as a sidecar: nothing of this has been done or written"]
    for name, said in rows:
        lines += [f"{name if at == 0 else '':<13}{line}" for at, line in enumerate(said)]
    return "\n".join(lines)


def _gate(server: Server) -> str:
    try:
        permission = ask_weights(server)
    except ConfigError as err:
        return f"gate shut: {err}"
    return "gate open" + "".join(f"; {note}" for note in permission.notes)


def _identity(launch: Launch) -> str:
    found = asdict(launch.identity(0)) | {"pid": "its process", "started": "then"}
    return json.dumps(found, sort_keys=True)
