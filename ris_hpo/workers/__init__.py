"""Who runs trials: one worker, a pool of local processes, actors on a Ray cluster."""
