"""Ask a skill's licence before anything of it is fetched: may it be loaded here, for this use?

The posture stands in the manifest. It is a label, not the licence: what the vendor's text allows is for a person to
read. Nothing here reads that text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from prts_core.config.licence import Licence
from prts_core.io.errors import ConfigError

ALLOW, OLD_ALLOW = "OPENRAL_ALLOW_NONCOMMERCIAL", "OPENRAL_ACCEPT_NONCOMMERCIAL"
FREE: frozenset[Licence] = frozenset({"apache-2.0", "mit", "bsd", "nvidia_open_model"})
UNTOLD: frozenset[Licence] = frozenset({"proprietary", "unknown"})


class Licensed(Protocol):
    """What is asked about: a skill's manifest, or weights that no manifest speaks for."""

    @property
    def name(self) -> str: ...

    @property
    def license(self) -> Licence: ...


@dataclass(frozen=True)
class Permission:
    """What the licence says. commercial: whether commercial use is known to be allowed. notes: what a user should be
    told, a sentence each."""

    licence: Licence
    commercial: bool
    notes: tuple[str, ...] = ()


def commercial_use_allowed(licence: Licence) -> bool:
    """Whether a posture allows commercial use; false where nobody has said so."""
    return licence in FREE


def ask_licence(asked: Licensed, *, commercial_use: bool = True, environ: Mapping[str, str] = os.environ) -> Permission:
    """Let a skill through, or raise ConfigError: one that is for non-commercial use only, asked for without either
    commercial_use=False or OPENRAL_ALLOW_NONCOMMERCIAL=1 ("1" and nothing else).

    Proprietary and unknown licences pass with a note: the manifest does not say what they forbid.
    """
    licence = asked.license
    if licence in FREE:
        return Permission(licence, True)
    if licence in UNTOLD:
        return Permission(licence, False, (f"{asked.name}: licence {licence}: read the vendor's text before use",))
    allowed, said = environ.get(ALLOW), environ.get(OLD_ALLOW)
    notes = [f"{asked.name}: licence {licence}: not for commercial use"]
    if allowed is None and said is not None:
        allowed = said
        notes.append(f"{OLD_ALLOW} is the name of old documents; `export {ALLOW}=1` in its place")
    if commercial_use and allowed != "1":
        raise ConfigError(
            f"The licence of {asked.name!r} does not allow commercial use",
            field="license",
            found=licence + ("" if allowed is None else f", and {ALLOW}={allowed!r}"),
            expected=f"a free licence ({', '.join(sorted(FREE))}), or a use that is not commercial",
            cure=f"read the vendor's licence; where your use is not commercial, `export {ALLOW}=1`",
        )
    return Permission(licence, False, tuple(notes))
