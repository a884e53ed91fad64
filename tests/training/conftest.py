"""The converted toy dataset of tests/data."""

from tests.data.conftest import toy

__all__ = ["toy"]
