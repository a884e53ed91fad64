"""Benchmarks of the kernels: contenders checked each in a process of its own, then timed in turns on the same inputs.

`timing`, `worker`, `machine` and `report` serve every operation; the other files are role attention's. It needs torch
only (and what the contenders need), and knows nothing of models.
"""
