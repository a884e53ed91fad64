"""Be torchrun for `children.py`: leave stop signals to the process that keeps the books, and end with it.

torchrun gives its workers 30 s after a signal and then kills them, checkpoint or not; here the bookkeeper reaches them
by a file and sets the limit.
"""

from __future__ import annotations

import signal
import sys

from prts_core.launch.orphans import end_with_parent
from prts_core.launch.signals import SIGNALS

if __name__ == "__main__":
    end_with_parent()
    for number in SIGNALS:  # a handler that does nothing: an ignored signal would stay ignored in the workers
        signal.signal(number, lambda *_: None)
    from torch.distributed.run import main

    main(["--signals-to-handle", "SIGHUP", *sys.argv[1:]])
