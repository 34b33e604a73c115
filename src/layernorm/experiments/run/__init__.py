"""One training run: the trainer, its checkpoints, its processes and what it tells."""
