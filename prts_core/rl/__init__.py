"""Improve a policy by reinforcement learning in a simulator: algorithms, densities of policies, learner, rollout side.

What a run is told stands in `prts_core.config.rl`; which stage it is part of is known above.
"""
