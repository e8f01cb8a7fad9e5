"""Training: data, optimizers, the loop, checkpoints."""
