#!/usr/bin/env python3
"""Times QK norm and rotary embedding against eager, compiled and Liger; needs torch and triton, and a GPU.

`python3 kernels/bench/qk_norm_rope.py [--device cpu]`. It finds prts_kernels beside itself when it is not installed,
and knows nothing else.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("prts_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prts_kernels.bench.qk_norm_rope import main

if __name__ == "__main__":
    sys.exit(main())
