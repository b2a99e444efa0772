"""Usage events as CloudEvents over HTTP, for whoever wants them as they happen."""
