"""Name the licence postures of weights: a closed list, that of the public openral schema.

A posture is a label, not the licence: what a vendor's text allows is for a person to read.
"""

from typing import Literal

Licence = Literal[
    "apache-2.0",
    "mit",
    "bsd",
    "permissive_research",
    "nvidia_non_commercial",
    "nvidia_open_model",
    "rlwrld_non_commercial",
    "proprietary",
    "unknown",
]
