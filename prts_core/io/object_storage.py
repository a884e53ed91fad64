"""Read files of object storage (s3://, gs://, http(s)://) through a bounded cache on the local disk.

Whole files are kept, each version of one as a file of its own; the least recently used leave first; any number of
processes share the cache. Credentials, region and endpoint come from the environment as each provider names them, and
are never written or shown. PRTS_CACHE: the cache's folder; PRTS_CACHE_GIB: its size.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prts_core.io.errors import ConfigError, DataError, UnavailableError, require
from prts_core.io.files import atomic_path, digest_bytes, explain_os_errors, write_text
from prts_core.io.locks import locked

FOLDER, SIZE = "PRTS_CACHE", "PRTS_CACHE_GIB"
DEFAULT_GIB = 50.0
# Scheme: (package that speaks it, extra that brings it).
SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http")}
_KEEP_S = 30.0  # a file that was handed out so lately is about to be opened
_CUT_S = 3600.0  # a download that has written nothing for so long was cut
_LEFT = 0.9  # of the size, once room was made
METADATA = "meta"  # folder of small files that never leave: a reader may come back to them at any time
_LOCKS, _USED = ".locks", ".used"


@dataclass(frozen=True)
class RemoteFile:
    """size in bytes, 0 where the store does not say; version: its own tag of the content (ETag, hash or generation),
    empty where it has none."""

    size: int
    version: str


def is_url(root: object) -> bool:
    """Whether `root` names a place in object storage."""
    return isinstance(root, str) and "://" in root


class RemoteFolder:
    """A folder in object storage. pinned: the files as they must be; others are taken as they are found, once a
    process.

    cache, gib: by default as the environment says. Raises ConfigError for a URL of an unknown kind or with credentials
    in it, MissingExtraError where its package is absent.
    """

    def __init__(
        self,
        url: str,
        pinned: Mapping[str, RemoteFile] | None = None,
        cache: Path | None = None,
        gib: float | None = None,
    ) -> None:
        self.url, self.pinned = _checked(url), dict(pinned or {})
        self.cache = cache or _cache_folder()
        self.limit = int((_cache_gib() if gib is None else gib) * 2**30)
        self.root = self.cache / digest_bytes(self.url.encode()).removeprefix("sha256:")[:20]
        self._begin()

    def _begin(self) -> None:
        self._known: dict[str, RemoteFile] = {}

    def fetch(self, name: str) -> Path:
        """The local copy of a file, whole and as the store has it. It stays for a while: open it soon.

        Raises DataError for a file that is missing, or is not the pinned one, UnavailableError where the store cannot
        be read.
        """
        known = self._known.get(name)
        if known is not None and self._touch(path := self._path(name, known)):
            return path
        wanted = known or self.pinned.get(name) or self.describe(name)
        path = self._path(name, wanted)
        with explain_os_errors(self.cache), locked(self.root / _LOCKS / digest_bytes(name.encode())[-2:]):
            if not wanted.version or not _whole(path, wanted):  # without a version nobody knows what a copy is of
                self._download(name, wanted, path)
        self._known[name] = wanted
        self._touch(path)
        return path

    def describe(self, name: str) -> RemoteFile:
        """Size and version of a file, asked of the store."""
        with self._told(name):
            return _described(self._system().info(self._address(name)))

    def exists(self, name: str) -> bool:
        """Whether there is such a file that may be read: a store that does not let itself be listed refuses access to
        what it does not have."""
        try:
            self.describe(name)
        except DataError:
            return False
        except UnavailableError as err:
            if isinstance(err.__cause__, PermissionError):
                return False
            raise
        return True

    def listing(self) -> dict[str, RemoteFile]:
        """Every file below the folder, in order of their names; only of stores that can list (not HTTP)."""
        if self.url.startswith("http"):
            raise ConfigError(
                "An HTTP server does not list its files",
                field="root",
                found=self.url,
                expected="s3:// or gs://",
                cure="download the dataset, or open it by its URL in Python: LeRobotDataset.open(url)",
            )
        with self._told(""):
            system = self._system()
            root = str(system._strip_protocol(self.url)).rstrip("/")
            found = system.find(root, detail=True)
        return {str(name)[len(root) + 1 :]: _described(info) for name, info in sorted(found.items())}

    # ---- the store -------------------------------------------------------------------------------------------------
    def _system(self) -> Any:
        """fsspec keeps one for each process, also after a fork."""
        return require("fsspec", "http").filesystem(urlsplit(self.url).scheme, use_listings_cache=False)

    def _address(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _path(self, name: str, version: RemoteFile) -> Path:
        tag = digest_bytes(f"{version.size} {version.version}".encode())[-12:]
        path = self.root / name
        return path.with_name(f"{tag}-{path.name}")

    def _download(self, name: str, wanted: RemoteFile, path: Path) -> None:
        if name in self.pinned and (found := self.describe(name)) != wanted:
            raise DataError(
                "A file in object storage is not the one that was taken over",
                file=self._address(name),
                found=f"{found.size} bytes, version {found.version[:40]}",
                expected=f"{wanted.size} bytes, version {wanted.version[:40]}",
                cure="run `prts convert` again, or restore the file",
            )
        self._make_room(wanted.size)
        with atomic_path(path) as partial:
            with self._told(name):
                self._system().get_file(self._address(name), str(partial))
            if not _whole(partial, wanted) or self.describe(name) != wanted:
                raise UnavailableError(
                    "A download was cut, or the file changed meanwhile",
                    file=self._address(name),
                    found=f"{partial.stat().st_size} bytes",
                    expected=f"{wanted.size} bytes",
                    cure="run the command again: what is whole is kept",
                )

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Say in one error what the store, its client or the network said."""
        address, again = self._address(name), "run the command again: what is whole is kept"
        try:
            try:
                yield
            except FileNotFoundError as err:  # which is also what fsspec says when an HTTP server does not answer
                cause = err.__cause__
                status = getattr(cause, "status", None)
                if not address.startswith("http") or cause is None or status in (404, 410):
                    raise
                fault = PermissionError if status in (401, 403) else OSError
                raise fault(f"{type(cause).__name__}: {cause}") from err
        except FileNotFoundError as err:
            lost = not self._bucket_exists()
            problem = "A bucket does not exist" if lost else "A file is missing in object storage"
            cure = "correct the URL's bucket" if lost else "correct the URL, or upload the file"
            raise DataError(problem, file=address, found=_said(err), cure=cure) from err
        except PermissionError as err:
            cure = "export the provider's credentials (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            raise UnavailableError("Object storage refuses access", file=address, found=_said(err), cure=cure) from err
        except _faults() as err:
            if "credential" in str(err).lower():
                again = "export the provider's credentials (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            cure = f"check the network and the endpoint (S3: AWS_ENDPOINT_URL), then {again}"
            raise UnavailableError("Object storage cannot be read", file=address, found=_said(err), cure=cure) from err

    def _bucket_exists(self) -> bool:
        parts = urlsplit(self.url)
        if parts.scheme.startswith("http"):
            return True
        try:
            return bool(self._system().exists(parts.netloc))
        except _faults():
            return True  # not known: the file is what was asked for

    # ---- the cache -------------------------------------------------------------------------------------------------
    def _touch(self, path: Path) -> bool:
        """Note that a file is used, in its access time; False where it is gone."""
        try:
            info = path.stat()
            if time.time() - info.st_atime > _KEEP_S / 6:
                os.utime(path, ns=(time.time_ns(), info.st_mtime_ns))
        except OSError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        """Remove what was not used for longest until `size` bytes fit; the sum is kept in a file, not counted each
        time."""
        if size > self.limit:
            raise ConfigError(
                "A file is larger than the whole cache",
                field=SIZE,
                found=f"{self.limit / 2**30:g} GiB",
                expected=f"at least {size / 2**30:.3g} GiB",
                cure=f"export {SIZE}=...",
            )
        self.cache.mkdir(parents=True, exist_ok=True)
        with locked(self.cache / _LOCKS):
            try:
                used = int((self.cache / _USED).read_text())
            except (OSError, ValueError):
                used = self.limit
            if used + size > self.limit:
                used = self._evict(size)
            write_text(self.cache / _USED, str(used + size))

    def _evict(self, size: int) -> int:
        """The bytes that are left."""
        files, now = [], time.time()
        for path in self.cache.rglob("*"):
            parts = path.relative_to(self.cache).parts
            if len(parts) < 2 or parts[1] in (_LOCKS, METADATA):
                continue
            with contextlib.suppress(OSError):  # another process removed it
                info = path.stat()
                under_way = ".partial-" in path.name and now - info.st_mtime < _CUT_S
                if path.is_file() and not under_way:
                    files.append((info.st_atime, info.st_size, path))
        used = sum(bytes_ for _, bytes_, _ in files)
        for last, bytes_, path in sorted(files, key=lambda file: file[0]):
            if used + size <= self.limit * _LEFT or now - last < _KEEP_S:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
        return used

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_known"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise ConfigError("A URL of an unknown kind", field="root", found=parts.scheme, expected=", ".join(SCHEMES))
    if "@" in parts.netloc or parts.query:
        cure = "leave it out and export the credentials: a URL is written into results"
        raise ConfigError("A URL holds credentials or a signature", field="root", expected="a plain URL", cure=cure)
    package, extra = SCHEMES[parts.scheme]
    require("fsspec", extra)
    require(package, extra)
    return url.rstrip("/")


def _whole(path: Path, wanted: RemoteFile) -> bool:
    try:
        size = path.stat().st_size
    except OSError:
        return False
    return not wanted.size or size == wanted.size


def _described(info: Mapping[str, Any]) -> RemoteFile:
    """What an fsspec file system tells of a file."""
    names = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "Last-Modified")
    version = next((str(info[name]) for name in names if info.get(name)), "")
    return RemoteFile(int(info.get("size") or 0), version.strip('"').replace("\n", " "))


def _said(err: Exception) -> str:
    """What an error says, without any secret that the environment holds."""
    text = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
    for name, value in os.environ.items():
        if len(value) > 3 and re.search("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", name.upper()):
            text = text.replace(value, "***")
    return text


def _faults() -> tuple[type[Exception], ...]:
    """OSError, and the errors of clients that are loaded and do not derive from it."""
    found: list[type[Exception]] = [OSError, TimeoutError]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    ):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "prts" / "object_storage"
    return Path(os.environ.get(FOLDER) or default).expanduser()


def _cache_gib() -> float:
    said = os.environ.get(SIZE) or str(DEFAULT_GIB)
    try:
        size = float(said)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ConfigError("A cache has no such size", field=SIZE, found=said, expected="GiB, above 0")
    return size
