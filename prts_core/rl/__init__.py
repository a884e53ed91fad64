"""Improve a policy by what it earns in a simulator: rollouts, advantages, losses, algorithms.

The maths here knows tensors alone: no policy, no simulator, no process group (a caller hands in the sum over
processes).
"""
