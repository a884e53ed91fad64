"""Collect episodes in processes beside the learner's, on this machine or over Ray: where they stand, how weights reach
them, and what becomes of their work when one is silent or dead.

placement*.py and rollout_places.py say where, without torch; fleet.py gives out work and replaces who is lost;
local_backend.py and ray_backend.py start workers; weights.py passes on what has changed; remote_collect.py is what a
worker does here; start.py puts them together.
"""
