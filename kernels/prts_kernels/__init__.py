"""GPU kernels of PRTS and their CPU references: one folder an operation, whose name says what it computes.

Requires torch; triton where a kernel is asked for. It does not know robots, models or the rest of PRTS.
"""
