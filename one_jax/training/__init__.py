"""Training: the step, its state, checkpoints and the files of a run."""
