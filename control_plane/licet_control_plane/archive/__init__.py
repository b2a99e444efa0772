"""A second record of usage: the ledger's blocks as files in a directory, written before sidecars are acknowledged."""
