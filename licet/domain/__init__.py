"""The domain: what a license, a plan, a quota and a decision are. Pure: no I/O, no clock, no randomness."""
