"""`python -m assets.pipes_main` with the stub chain: what a launched stage of the stub location runs."""

import sys

from prts_core.store.run_stage import untracked
from prts_core.tracking import runs
from tests.pipelines import stub_chain

if __name__ == "__main__":
    runs.stage_run = untracked
    stub_chain.declarations.STAGES.update(stub_chain.stubbed_stages())
    from assets.pipes_main import main

    sys.exit(main())
