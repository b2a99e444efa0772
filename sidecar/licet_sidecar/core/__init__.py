"""What a sidecar decides, holds and knows. Pure: time, randomness and I/O come in as arguments."""
