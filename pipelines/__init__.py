"""Binds the assets and runs them: definitions, resources per environment, jobs, schedules, sensors, and `make demo`."""
