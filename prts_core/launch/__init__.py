"""Decide where a stage runs and how it is told to stop: here, in a process of its own, over torchrun's processes.

The room ends at the process: which stage it is, what its result means and where it is kept is known above.
"""
