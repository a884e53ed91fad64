"""Improve a policy by what it earns in a simulator: rollouts, advantages, updates, evaluations, in iterations.

The room's border: environments and workers are sim's, the densities of actions lie with the heads (models/heads), the
evaluation is rollout's runner. Here: which episodes are run (episodes.py), how they are collected (collect.py), what
they are worth (rewards.py, advantages.py), the algorithms (algorithms/, one file each), the learner and the loop; and
where all that runs (placement.py), with rollout processes under supervision (fleet.py) and weights on their way to
them (weights.py).
"""
