"""Ask whether a package may be installed at all, before anything but its manifest is fetched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prts_core.io.errors import ConfigError
from prts_core.skills.licence import ask_licence
from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.kinds import KINDS

SIGNED = "OPENRAL_REQUIRE_SIGNED_SKILLS"


@dataclass(frozen=True)
class Request:
    """What is asked for. where: the manifest's place, for errors. trusted: keys by which the package's signature
    will be known; none: it is not asked for."""

    manifest: Manifest
    where: object
    commercial_use: bool = True
    trusted: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def admit(request: Request) -> tuple[str, ...]:
    """Notes for the user, or the ConfigError of the first gate that is shut."""
    return tuple(note for gate in GATES.values() for note in gate(request))


def _template(request: Request) -> tuple[str, ...]:
    if request.manifest.is_template:
        raise ConfigError(
            "This package is a template",
            file=request.where,
            field="name, weights_uri, source_repo",
            found=request.manifest.name,
            expected="your owner and skill in place of TEMPLATE_ORG and TEMPLATE_ID",
            cure="replace both words in the manifest wherever they stand",
        )
    return ()


def _kind(request: Request) -> tuple[str, ...]:
    if not KINDS[request.manifest.kind].resolvable:
        kinds = ", ".join(name for name, kind in KINDS.items() if kind.resolvable)
        raise ConfigError(
            "Nothing can load a skill of this kind",
            file=request.where,
            field="kind",
            found=request.manifest.kind,
            expected=kinds,
        )
    return ()


def _signature(request: Request) -> tuple[str, ...]:
    if request.environ.get(SIGNED) == "1" and request.trusted is None:
        raise ConfigError(
            "Only signed skills are wanted, and nothing says whose signature counts",
            file=request.where,
            field=SIGNED,
            found="1, and no --trusted",
            cure="give `--trusted KEYS` (`prts serve`: `--require-signature KEYS`), a folder of public keys",
        )
    return ()


def _licence(request: Request) -> tuple[str, ...]:
    asked = ask_licence(request.manifest, commercial_use=request.commercial_use, environ=request.environ)
    return asked.notes


GATES: dict[str, Callable[[Request], tuple[str, ...]]] = {
    "template": _template,
    "kind": _kind,
    "signature": _signature,
    "licence": _licence,
}
