"""Remember which server stands at a port of this machine, so that nobody is answered by another model than they think.

`<cache>/prts/sidecars/run/port-<port>.json` is written once the server answers, and removed when it is ended. It counts
only while the process that it names listens at that port: one that a kill left behind vouches for nobody.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from prts_core.io.errors import DataError, ServeError
from prts_core.io.files import read_json, write_json
from prts_core.serving.sidecar.families import HOST, Server
from prts_core.serving.sidecar.ports import listens
from prts_core.sim.installations import cache


def run_folder() -> Path:
    """Identities, logs and locks of servers that run on this machine for this user."""
    return cache() / "sidecars" / "run"


@dataclass(frozen=True)
class Identity:
    """Who listens where. rtc: the mode with its numbers. revision: of the server's code; a script's path where one was
    named. started: UTC."""

    port: int
    family: str
    model: str
    embodiment_tag: str
    quantization: str
    rtc: str
    revision: str
    pid: int
    host: str
    started: str

    @staticmethod
    def of(server: Server, revision: str, pid: int) -> Identity:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return Identity(
            port=server.port,
            family=server.family.name,
            model=server.model,
            embodiment_tag=server.embodiment_tag,
            quantization=server.quantization,
            rtc=server.rtc_words,
            revision=revision,
            pid=pid,
            host=HOST,
            started=started,
        )

    @staticmethod
    def file(port: int) -> Path:
        return run_folder() / f"port-{port}.json"

    @staticmethod
    def read(port: int) -> Identity | None:
        """Of the process that listens there; none where no file vouches for it. DataError for a malformed file."""
        path = Identity.file(port)
        if not path.is_file():
            return None
        raw = read_json(path)
        kinds = {field.name: int if field.type == "int" else str for field in fields(Identity)}
        if not isinstance(raw, dict) or {name: type(value) for name, value in raw.items()} != kinds:
            raise DataError(
                "An identity file is malformed",
                file=path,
                found=f"{raw!r:.200}",
                expected=", ".join(kinds),
                cure=f"stop what listens on port {port}, then `rm {path}`",
            )
        found = Identity(**raw)
        return found if found.port == port and listens(found.pid, port) else None

    def write(self) -> None:
        write_json(Identity.file(self.port), asdict(self))

    def require(self, wanted: Identity) -> None:
        """ServeError that names what differs, unless this is the server that is wanted."""
        ours, theirs = asdict(wanted), asdict(self)
        differ = [name for name in ours if name not in ("pid", "started") and ours[name] != theirs[name]]
        if differ:
            raise ServeError(
                "Another server stands at this port",
                file=Identity.file(self.port),
                field=", ".join(differ),
                found="; ".join(f"{name} {theirs[name]}" for name in differ) + f" (process {self.pid})",
                expected="; ".join(f"{name} {ours[name]}" for name in differ),
                cure=f"`kill {self.pid}` where nobody needs it, or name another --sidecar-port",
            )
