"""Say what RLDX-1's and GR00T's own servers are: where they come from, what they install, how they are started.

Facts about other people's programs, read from their public sources; none of their code is here, and neither of the two
has been run by us. A further family is a further entry.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from prts_core.config.licence import Licence
from prts_core.io.errors import ServeError, lookup

Quantization = Literal["none", "nf4", "int8"]
RtcMode = Literal["none", "trained", "guided"]
HOST = "127.0.0.1"  # such a server ends on anybody's `kill`: it is never offered to the network
BITSANDBYTES = "bitsandbytes==0.50.2"  # what holds weights in 4 or 8 bits; the servers do not install it themselves


@dataclass(frozen=True)
class Family:
    """A kind of server.

    repository, revision: what is checked out. script: that starts the server, in there. package: that must import once
    it is installed. model: served where none is named; none: one has to be named. embodiment_tag: the same. licence: of
    the published weights, as a posture; licence_note: what a user should read. remembers: it keeps sessions. rtc: it
    goes on from the chunk before by itself. head: module that draws the actions, which quantisation leaves alone.
    """

    name: str
    title: str
    repository: str
    revision: str
    script: str
    package: str
    model: str | None
    embodiment_tag: str
    licence: Licence
    licence_note: str
    head: str
    remembers: bool = False
    rtc: bool = False
    python: str = "3.10"


RLDX = Family(
    name="rldx",
    title="RLDX-1",
    repository="https://github.com/RLWRLD/RLDX-1.git",
    revision="21007bd444e729b0532ab8bb450b3f975d5129be",
    script="rldx/eval/run_rldx_server.py",
    package="rldx",
    model="RLWRLD/RLDX-1-FT-LIBERO",
    embodiment_tag="GENERAL_EMBODIMENT",
    licence="rlwrld_non_commercial",
    licence_note="code Apache-2.0; weights RLWRLD Model License v1.0: not commercial, with attribution",
    head="action_model",
    remembers=True,
    rtc=True,
)
GROOT = Family(
    name="gr00t",
    title="GR00T N1.7",
    repository="https://github.com/NVIDIA/Isaac-GR00T.git",
    revision="23ace64f",
    script="gr00t/eval/run_gr00t_server.py",
    package="gr00t",
    model=None,
    embodiment_tag="NEW_EMBODIMENT",
    licence="nvidia_open_model",
    licence_note="code Apache-2.0; weights of N1.7 NVIDIA Open Model License, of earlier ones not commercial",
    head="action_head",
)
FAMILIES = {family.name: family for family in (RLDX, GROOT)}


@dataclass(frozen=True)
class Server:
    """One server that is wanted. model: a hub id, or a folder by its absolute path. rtc_delay, rtc_horizon: rows of a
    chunk that are executed until the answer comes, and between two looks, for rtc other than "none"."""

    family: Family
    model: str
    embodiment_tag: str
    port: int
    quantization: Quantization = "none"
    rtc: RtcMode = "none"
    rtc_delay: int | None = None
    rtc_horizon: int | None = None

    @staticmethod
    def of(
        family: str,
        model: str | None = None,
        embodiment_tag: str | None = None,
        port: int | None = None,
        quantization: str = "none",
        rtc: str = "none",
        rtc_delay: int | None = None,
        rtc_horizon: int | None = None,
    ) -> Server:
        """With the family's defaults, and a port of its own. ServeError for what does not go together."""
        kind = lookup(FAMILIES, family, "sidecar")
        chosen = model or kind.model
        if chosen is None:
            raise ServeError(
                f"{kind.title} has no model that would be served by default",
                field="--model",
                found="nothing",
                expected="a checkpoint's folder, or its id on the hub",
            )
        if Path(chosen).expanduser().exists():
            chosen = str(Path(chosen).expanduser().resolve())
        elif chosen.startswith(("/", "~", ".", "models:")):
            raise ServeError("There is no such folder", field="--model", found=chosen, expected="a checkpoint's folder")
        if chosen.startswith("-") or (embodiment_tag or "").startswith("-"):
            raise ServeError("This would be an option of the server", found=chosen, expected="a model, a tag")
        for field, value, allowed in (
            ("--quantization", quantization, get_args(Quantization)),
            ("--sidecar-rtc", rtc, get_args(RtcMode)),
        ):
            if value not in allowed:
                raise ServeError("There is no such choice", field=field, found=value, expected=", ".join(allowed))
        _check_rtc(kind, rtc, rtc_delay, rtc_horizon)
        if port is not None and not 0 < port < 65536:
            raise ServeError("This is no port", field="--sidecar-port", found=port, expected="1 to 65535")
        tag = embodiment_tag or kind.embodiment_tag
        given = port or default_port(family, chosen, tag, quantization, rtc)
        return Server(kind, chosen, tag, given, quantization, rtc, rtc_delay, rtc_horizon)  # type: ignore[arg-type]

    def flags(self) -> list[str]:
        """The arguments of the server's own script."""
        given = ["--model-path", self.model, "--embodiment-tag", self.embodiment_tag]
        given += ["--host", HOST, "--port", str(self.port)]
        if self.family.rtc:  # said even where it is "none": a checkpoint has a mode of its own
            given += ["--rtc-inference-mode", self.rtc]
            for flag, value in (("delay", self.rtc_delay), ("exec-horizon", self.rtc_horizon)):
                given += [] if value is None else [f"--rtc-inference-{flag}", str(value)]
        return given

    @property
    def rtc_words(self) -> str:
        """The mode and its numbers in a word, for identities."""
        return self.rtc if self.rtc == "none" else f"{self.rtc} {self.rtc_delay} {self.rtc_horizon}"


def default_port(*identity: str) -> int:
    """20000 to 39999, by what the server is: two that differ meet only by chance."""
    return 20000 + int.from_bytes(hashlib.sha1("|".join(identity).encode()).digest()[:2], "big") % 20000


def _check_rtc(family: Family, mode: str, delay: int | None, horizon: int | None) -> None:
    given = [number for number in (delay, horizon) if number is not None]
    if mode == "none" and given:
        raise ServeError(
            "Rows are given for real-time chunking, which is off",
            field="--sidecar-rtc-delay, --sidecar-rtc-horizon",
            found=", ".join(map(str, given)),
            cure="add --sidecar-rtc trained or guided, or leave them out",
        )
    if mode != "none" and not family.rtc:
        raise ServeError(
            f"{family.title} has no real-time chunking", field="--sidecar-rtc", found=mode, expected="none"
        )
    if mode != "none" and (delay is None or any(number < 1 for number in given)):
        raise ServeError(
            "Real-time chunking needs to know the delay",
            field="--sidecar-rtc-delay",
            found=delay,
            expected="rows of a chunk that are executed until the answer is here, at least 1",
        )
