"""`python -m pipelines` is `make demo`. A module of its own, so that simulator workers do not import Dagster again.

(multiprocessing imports the main module in every worker it spawns, but for one called `__main__`.)
"""

from __future__ import annotations

import sys

from pipelines.demo import main

if __name__ == "__main__":
    sys.exit(main())
