"""Discounted, symmetric InfoNCE with a false-negative mask, over a batch that may be spread over processes.

It does not know what the two sides of the contrast are, nor how they were embedded.
"""

from __future__ import annotations

from prts_kernels.info_nce.processes import ALONE, Group, Processes
from prts_kernels.info_nce.select import IMPLEMENTATIONS, InfoNce, info_nce

__all__ = ["ALONE", "IMPLEMENTATIONS", "Group", "InfoNce", "Processes", "info_nce"]
