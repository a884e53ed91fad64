"""The MLflow store and the plan of tests/tracking."""

from tests.tracking.conftest import outputs, plan

__all__ = ["outputs", "plan"]
