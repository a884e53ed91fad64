"""Hold the versions of a policy that are served side by side: the present one, a candidate, one to fall back to.

A session keeps the version that it began with. The one before the present is kept; elder ones are let go once no
session holds them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from prts_core.contract import require_equal
from prts_core.io.errors import ContractError, ServeError
from prts_core.policy.observation import Answers
from prts_core.value.alarm import Alarm


@dataclass(eq=False)
class Version:
    """name: of the registry, or a folder's. digest: of the package. alarm: that it brings, if any. replicas: of the
    policy, in other processes. sessions: that hold it."""

    name: str
    policy: Answers
    digest: str = ""
    alarm: Alarm | None = None
    replicas: tuple[Answers, ...] = ()
    sessions: int = 0


@dataclass
class Versions:
    """current: of new sessions, but for a `share` that the candidate gets. previous: what `current` replaced."""

    current: Version
    candidate: Version | None = None
    share: float = 0.0
    previous: Version | None = None
    draining: list[Version] = field(default_factory=list)

    def of(self, session: str) -> Version:
        """Which version a new session gets: a share of the names, so that one that is opened again by its name meets
        the same version. A connection has a new name each time."""
        if self.candidate is None:
            return self.current
        draw = int.from_bytes(hashlib.sha256(session.encode()).digest()[:8], "big") / 2**64
        return self.candidate if draw < self.share else self.current

    def offer(self, version: Version, share: float = 1.0) -> None:
        """New sessions get `version`, or a share of them do. ContractError where its inputs or outputs mean other
        numbers than robots are connected for; what it was normalised by may differ."""
        if not 0 < share <= 1:
            raise ServeError("A share is part of a whole", field="--canary", found=share, expected="above 0, at most 1")
        ours, theirs = version.policy.contract, self.current.policy.contract
        require_equal(
            ours.contract,
            theirs.contract,
            left_name=f"version {version.name}",
            right_name=f"version {self.current.name}, which is served",
        )
        if ours.chunk_length != theirs.chunk_length:
            raise ContractError(
                f"Version {version.name} gives chunks of another length than what is served",
                field="chunk_length",
                found=ours.chunk_length,
                expected=theirs.chunk_length,
                cure="serve it as a server of its own, and connect robots to that one",
            )
        self._release(self.candidate, keep=version)
        self.candidate, self.share = None, 0.0
        if share < 1:
            self.candidate, self.share = version, share
            return
        self._release(self.previous, keep=version)
        self.previous, self.current = self.current, version

    def go_back_to(self, version: Version) -> bool:
        """Every new session gets `version`, which is held. Whether that changes anything."""
        if version is self.current and self.candidate is None:
            return False
        if self.candidate is not None:
            self._release(self.candidate, keep=version)
            self.candidate, self.share = None, 0.0
        if version is not self.current:
            self.offer(version)
        return True

    def held(self) -> list[Version]:
        """Every version that is kept in memory; those that drained are let go."""
        self.draining = [version for version in self.draining if version.sessions]
        every = [self.current, self.candidate, self.previous, *self.draining]
        return list({id(version): version for version in every if version is not None}.values())

    def _release(self, version: Version | None, keep: Version | None = None) -> None:
        if version is not None and version is not keep and version.sessions:
            self.draining.append(version)
