"""The sidecar's hands: Redis and the state directory. Foreign errors are translated here, and nowhere else."""
