"""Serve policies that need a Python of their own: their server runs as our child, and ours answers robots in its place.

families.py says what such a server is and how it is started, home.py installs it, child.py starts, waits and ends,
identity.py says which server stands at a port, supervisor.py keeps one there, policy.py asks it.
"""
