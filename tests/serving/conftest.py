"""Property tests here run on a shared, busy machine: examples have no deadline and are the same in every run."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("room", deadline=None, derandomize=True, database=None)
settings.load_profile("room")
