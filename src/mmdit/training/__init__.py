"""Training: losses of flow matching, adapters, data, checkpoints, and a plain loop of parts."""
