"""The shells: they await, call the core, run what it asks for, and hold no policy."""
