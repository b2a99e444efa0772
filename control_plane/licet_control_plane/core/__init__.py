"""The control plane's decisions. Pure: no I/O, no clock, no randomness."""
