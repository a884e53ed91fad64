"""A family of suites whose simulator waits and computes nothing, so that what a step costs is known: for benchmarks of
who waits for whom, and of what is not the simulator's doing."""
