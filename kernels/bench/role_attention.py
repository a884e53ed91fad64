#!/usr/bin/env python3
"""Times role attention against stock kernels on this machine; needs torch, on a GPU also triton.

`python3 kernels/bench/role_attention.py` on a machine with a GPU; `--device cpu` tries the machinery elsewhere. It
finds prts_kernels beside itself when it is not installed, and knows nothing else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("prts_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prts_kernels.bench.role_attention import main

if __name__ == "__main__":
    sys.exit(main())
