"""Install a family's own server into a home of its own: its repository at a pinned revision, its packages by its lock.

    <cache>/prts/sidecars/<family>/source/          the checkout
                                   venv/            its own Python and packages
                                   installed.json   written last: a home without it is not installed

We run git and uv and read nothing of what they bring but whether its package imports.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prts_core.io.errors import UnavailableError
from prts_core.io.locks import locked
from prts_core.io.processes import how_it_ended, last_words
from prts_core.serving.sidecar.families import BITSANDBYTES, Server
from prts_core.sim import installer
from prts_core.sim.installations import Installation, cache

FORMAT = 1  # of what a home holds; another one is built anew


@dataclass(frozen=True)
class Command:
    """What is run to install, and the variables that it gets beside the cleaned environment."""

    words: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *self.words])


@dataclass(frozen=True)
class Home(Installation):
    """Where one family's server lives."""

    @property
    def path(self) -> Path:
        return cache() / "sidecars" / self.family

    @property
    def source(self) -> Path:
        return self.path / "source"


def clean_environment(without: tuple[str, ...] = ()) -> dict[str, str]:
    """This environment less what another Python must not see: our own Python's variables, and our keys.

    without: names that must not be handed on either.
    """
    hidden = (*installer.PRIVATE, "PRTS_")
    return {key: value for key, value in os.environ.items() if not key.startswith(hidden) and key not in without}


def wanted(server: Server) -> dict[str, Any]:
    """What makes an installation the one that `server` needs."""
    family = server.family
    found = {"format": FORMAT, "repository": family.repository, "revision": family.revision, "python": family.python}
    return found if server.quantization == "none" else found | {"quantizer": BITSANDBYTES}


def install_commands(server: Server, home: Home) -> list[Command]:
    """Everything that is run, in its order; the last one says whether the package is there."""
    family, python = server.family, str(home.python)
    sync = ("uv", "sync", "--project", str(home.source), "--python", family.python, "--frozen")
    commands = [
        Command(("git", "clone", "--no-checkout", family.repository, str(home.source)), {"GIT_LFS_SKIP_SMUDGE": "1"}),
        Command(("git", "-C", str(home.source), "checkout", "--detach", family.revision), {"GIT_LFS_SKIP_SMUDGE": "1"}),
        Command(sync, {"UV_PROJECT_ENVIRONMENT": str(home.path / "venv")}),
    ]
    if server.quantization != "none":
        commands.append(Command(("uv", "pip", "install", "--python", python, BITSANDBYTES)))
    return [*commands, Command((python, "-I", "-c", f"import {family.package}"))]


def missing_commands(server: Server, home: Home) -> list[Command]:
    """Those that this home still needs: none, what quantises alone, or all."""
    if home.installed(wanted(server)) is not None:
        return []
    there = home.installed(wanted(replace(server, quantization="none"))) is not None
    return install_commands(server, home)[3 if there else 0 :]  # a server may be running from this checkout


def install(server: Server, home: Home) -> dict[str, Any]:
    """Install, or find everything done; what installed.json says. UnavailableError with the last words of the command
    that failed; the next attempt begins anew, with what uv keeps in its cache."""
    with locked(home.path / ".lock") as lock:
        if (found := home.installed(wanted(server))) is not None:
            return found
        commands = missing_commands(server, home)
        home.record.unlink(missing_ok=True)
        log = home.path / "install.log"
        log.unlink(missing_ok=True)
        if commands == install_commands(server, home):
            shutil.rmtree(home.source, ignore_errors=True)
        for command in commands:
            print(f"{server.family.title}: {command}", file=sys.stderr, flush=True)
            _run(command, log, lock, server.family.title)
        return installer.finish(home, wanted(server), {"imports": server.family.package})


def _run(command: Command, log: Path, lock: int, title: str) -> None:
    tool = command.words[0]
    try:
        with log.open("ab") as file:
            done = subprocess.run(
                command.words,
                env=clean_environment() | dict(command.variables),
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
                check=False,
                pass_fds=(lock,),  # where this process is killed, the next installation waits until that one has ended
            )
    except FileNotFoundError as err:
        raise UnavailableError(
            f"{title} cannot be installed without {tool}",
            found=f"no command {tool!r}",
            expected="git and uv 0.8.4 or later",
            cure="`pip install uv`" if tool == "uv" else f"install {tool}",
        ) from err
    if done.returncode:
        raise UnavailableError(
            f"{title} cannot be installed",
            file=log,
            field=str(command),
            found=f"{how_it_ended(done.returncode)}; {last_words(log, 800)}",
            cure="run the same command again where there is a network; or install it yourself, and name its Python "
            "with --sidecar-python and its script with --sidecar-script",
        )
