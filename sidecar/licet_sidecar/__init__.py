"""The data plane: one in each pod, deciding from memory, holding leases, recording every answer."""
