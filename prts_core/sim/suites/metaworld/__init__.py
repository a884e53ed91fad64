"""Meta-World as a family of suites, in the main environment. It knows nothing beyond its own simulator."""
