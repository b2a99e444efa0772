"""What crosses between the programs: Redis names, signed documents, batches of usage events. No I/O."""
