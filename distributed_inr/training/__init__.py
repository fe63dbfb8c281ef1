"""Training: engines, checkpoints and the loop."""
