"""Improve a policy by reinforcement learning: what it does in simulators, what that was worth, how it changes."""
