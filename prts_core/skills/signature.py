"""Sign the list of a package's digests with Ed25519, and ask for a signature by a key that the operator trusts.

signature.json holds the public key and the signature of digests.json, byte by byte. Keys are PEM files, as OpenSSL
writes them (`openssl genpkey -algorithm ed25519`); which keys count is the operator's to say, a package's own word does
not.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.config.checked_yaml import check
from prts_core.config.checks import Strict
from prts_core.io.errors import CheckpointError, ConfigError, require
from prts_core.io.files import digest_bytes, read_json, write_bytes, write_json
from prts_core.skills.digests import FILE, RESTORE, SIGNATURE, Digests, read_digests, verify_files, write_digests
from prts_core.skills.evaluations import verify_evaluations
from prts_core.skills.manifest import read_manifest
from prts_core.skills.weights import hub_weights, verify_hub_weights

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "ed25519"


@dataclass(frozen=True)
class Signature(Strict):
    """public_key: 32 bytes, signature: 64 bytes, both in base64."""

    algorithm: str
    public_key: str
    signature: str


def new_key(path: Path) -> Path:
    """Write a private key (readable by its owner alone) and, beside it, the public one, whose path is returned."""
    serialization: Any = require("cryptography.hazmat.primitives.serialization", "serve")
    ed25519: Any = require("cryptography.hazmat.primitives.asymmetric.ed25519", "serve")
    public = path.with_suffix(".pub.pem")
    for there in (path, public):
        if there.exists():
            raise ConfigError("There is a key at this place already", file=there, cure="choose another place")
    key = ed25519.Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    write_bytes(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return public


def sign(package: Path, key: Path) -> Digests:
    """List a package anew and sign the list, after what there is was found sound: its manifest, its records of
    evaluations and, where it has a list already, its files but for records that were added since.

    Weights on the hub are fetched and listed too. Raises ConfigError, DataError or CheckpointError for what is wrong.
    """
    private = _private_key(key)
    manifest = read_manifest(package)
    if (package / FILE).exists():
        verify_files(package, but_records=True)
    verify_evaluations(package)
    listed = write_digests(package, hub_weights(manifest))
    raw = (package / FILE).read_bytes()
    public = private.public_key().public_bytes_raw()
    signature = {
        name: base64.b64encode(data).decode()
        for name, data in (("public_key", public), ("signature", private.sign(raw)))
    }
    write_json(package / SIGNATURE, {"algorithm": ALGORITHM} | signature)
    return listed


def verify(package: Path, trusted: Path | None = None) -> Digests:
    """The list of a package, after manifest, files, weights on the hub and records of evaluations were found to be
    those that are listed, and made of each other. trusted: a public key or a folder of them, one of which must have
    signed it; none: a signature is not asked for."""
    if trusted is not None:
        require_signature(package, trusted)
    listed = verify_files(package)
    manifest = read_manifest(package)
    verify_evaluations(package, listed.package_digest)
    verify_hub_weights(manifest, listed.weights, package / FILE)
    return listed


def require_signature(package: Path, trusted: Path) -> None:
    """CheckpointError unless one of the trusted keys signed the list of digests as it stands."""
    keys = trusted_keys(trusted)
    exceptions: Any = require("cryptography.exceptions", "serve")
    ed25519: Any = require("cryptography.hazmat.primitives.asymmetric.ed25519", "serve")
    cure = f"`prts skill sign {package} --key KEY.pem` by whoever is trusted here"
    path = package / SIGNATURE
    if not path.is_file():
        raise CheckpointError(
            "A package is not signed, and only signed ones are wanted", file=path, found="no such file", cure=cure
        )
    read_digests(package)
    said = check(Signature, read_json(path), path, what="signature", cure=cure)
    try:
        public, signature = (base64.b64decode(text, validate=True) for text in (said.public_key, said.signature))
        if said.algorithm != ALGORITHM:
            raise ValueError(said.algorithm)
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, (package / FILE).read_bytes())
    except (ValueError, exceptions.InvalidSignature) as err:
        raise CheckpointError(
            "A package's list of digests is not what was signed",
            file=package / FILE,
            found=f"a signature that does not fit ({type(err).__name__})",
            expected=f"the list that {SIGNATURE} was made of",
            cure=f"{RESTORE}, or {cure}",
        ) from err
    if public not in keys:
        raise CheckpointError(
            "A package is signed by somebody who is not trusted here",
            file=path,
            field="public_key",
            found=fingerprint(public),
            expected=" or ".join(f"{fingerprint(raw)} ({name})" for raw, name in keys.items()),
            cure=f"put the signer's public key among the trusted ones, where you trust them; or {cure}",
        )


def fingerprint(public: bytes) -> str:
    return digest_bytes(public)[:23]


def trusted_keys(place: Path) -> dict[bytes, str]:
    """Raw public key -> file name, of one PEM file or of every public one in a folder. ConfigError where there is
    none."""
    serialization: Any = require("cryptography.hazmat.primitives.serialization", "serve")
    found = {}
    for path in sorted(place.glob("*.pem")) if place.is_dir() else [place]:
        try:
            raw = path.read_bytes()
            if place.is_dir() and b"PRIVATE KEY" in raw:
                continue
            found[serialization.load_pem_public_key(raw).public_bytes_raw()] = path.name
        except (OSError, ValueError, AttributeError) as err:
            raise _no_key(path, "a public Ed25519 key in PEM", err) from err
    if not found:
        raise ConfigError(
            "No trusted key is given",
            file=place,
            found="no public key",
            expected="a PEM file, or a folder of them",
            cure="`prts skill keygen KEY.pem` makes a pair; put KEY.pub.pem there",
        )
    return found


def _private_key(path: Path) -> Ed25519PrivateKey:
    serialization: Any = require("cryptography.hazmat.primitives.serialization", "serve")
    ed25519: Any = require("cryptography.hazmat.primitives.asymmetric.ed25519", "serve")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return key
        raise ValueError(type(key).__name__)
    except (OSError, ValueError, TypeError) as err:
        raise _no_key(path, "a private Ed25519 key in PEM, without a password", err) from err


def _no_key(path: Path, expected: str, err: Exception) -> ConfigError:
    found = f"{type(err).__name__}: {err}"[:200]
    return ConfigError(
        "A key cannot be read", file=path, found=found, expected=expected, cure="`prts skill keygen KEY.pem` makes one"
    )
