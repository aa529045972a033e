"""The trainer: steps, checkpoints, telemetry, phases and the proof that it learns."""
