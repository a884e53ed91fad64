"""Talk to a served policy from a robot: clients of both protocols, reconnection, the queue of action chunks, ROS 2.

What lies here, prts_core/contract.py and a few files of prts_core/io are also a distribution of their own,
`prts-client`, which a robot's computer installs without the rest (pyproject.toml beside this file lists them). There
the package is called `prts_client`: these files import each other relatively, and nothing that is not among them.
"""
