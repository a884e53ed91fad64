"""Know clients by their API keys: several, each with a name, that can be added and revoked while the server runs.

A key file has a line a key: a name and the SHA-256 of the key, `laptop sha256:9f86d0...`; `#` begins a comment. It is
read again whenever it changes. Nothing here tells by its timing how much of a key was right.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from prts_core.io.errors import ServeError

logger = logging.getLogger("prts.serve")

SHORTEST = 8
LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+sha256:([0-9a-f]{64})$")
ONLY = "key"  # the name of one that was given without


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class Keys:
    """key: the only one, from the environment. file: of more. Neither: every client may speak."""

    def __init__(self, key: str | None = None, file: Path | None = None) -> None:
        if key is not None and (len(key) < SHORTEST or not key.isascii()):
            raise ServeError(
                "An API key is too short", field="api_key", expected=f"at least {SHORTEST} ASCII characters"
            )
        self.file = file
        self._given = {ONLY: digest(key.encode())} if key is not None else {}
        self._filed: dict[str, str] = {}
        self._stamp: tuple[int, int] | None = None
        if file is not None:
            self._filed = read_keys(file)
            self._stamp = _stamp(file)

    def __bool__(self) -> bool:
        return bool(self._given) or self.file is not None

    def name_of(self, given: bytes) -> str | None:
        """Whose key it is, or none. All keys are compared, in time that depends on none of them."""
        self._refresh()
        hashed, found = digest(given), None
        for name, known in (self._given | self._filed).items():
            if hmac.compare_digest(hashed, known):
                found = name
        return found

    def admits(self, given: bytes) -> bool:
        return not self or self.name_of(given) is not None

    def _refresh(self) -> None:
        """Take over what the file says now; where it cannot be read, what it said before goes on."""
        if self.file is None:
            return
        try:
            stamp = _stamp(self.file)
            if stamp != self._stamp:
                self._filed, self._stamp = read_keys(self.file), stamp
                logger.warning("API keys: %s", ", ".join(self._filed) or "none")
        except (OSError, ServeError) as err:
            if self._stamp is not None:
                logger.error("API keys cannot be read again, those of before go on: %s", err)
                self._stamp = None


def read_keys(file: Path) -> dict[str, str]:
    """{name: SHA-256}. ServeError names the line that is none."""
    found: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        told = getattr(err, "strerror", None) or str(err)
        raise ServeError("The file of API keys cannot be read", file=file, found=told) from err
    for number, line in enumerate(lines, 1):
        said = line.split("#", 1)[0].strip()
        if not said:
            continue
        match = LINE.match(said)
        if match is None or match[1] in found:
            raise ServeError(
                "A line is no API key" if match is None else "An API key's name stands twice",
                file=file,
                field=f"line {number}",
                found=said[:40],
                expected="NAME sha256:<64 hexadecimal digits>, each name once",
                cure='printf %s "$KEY" | sha256sum',
            )
        found[match[1]] = match[2]
    return found


def _stamp(file: Path) -> tuple[int, int]:
    told = file.stat()
    return told.st_mtime_ns, told.st_size
