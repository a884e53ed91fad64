"""Read and write public checkpoints in their own layout and numerics."""
