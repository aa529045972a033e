"""Training: configuration, plan of the phases, steps, checkpoints, and the proof that a network can learn."""
