"""LIBERO-Plus's seven axes over LIBERO's own scenes, as a layer of ours; it runs in LIBERO's environment."""
