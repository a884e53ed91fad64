"""LIBERO: 130 table-top tasks for a Franka Panda, in an environment of its own (`prts sim install libero`)."""
