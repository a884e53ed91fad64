"""Role-aware causal attention: key j is visible to query i iff j <= i and i < key_end[j].

One int32 a key holds segments, padding and roles at once; `mask.py` builds it. It does not know what tokens mean.
"""

from __future__ import annotations

from prts_kernels.role_attention.mask import RoleMask
from prts_kernels.role_attention.select import IMPLEMENTATIONS, role_attention

__all__ = ["IMPLEMENTATIONS", "RoleMask", "role_attention"]
