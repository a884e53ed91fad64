"""RMS norm of every query and key head followed by the rotary embedding, as one operation.

It does not know positions, how cos and sin interleave their axes, or models.
"""

from __future__ import annotations

from prts_kernels.qk_norm_rope.select import IMPLEMENTATIONS, qk_norm_rope

__all__ = ["IMPLEMENTATIONS", "qk_norm_rope"]
