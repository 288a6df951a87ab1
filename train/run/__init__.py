"""A training run: the loop, its folder, checkpoints, metrics and status."""
