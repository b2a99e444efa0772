"""Takes usage batches from Redis to the ledger, and tells each sidecar what is committed.

*Concurrency rule.* One task a shard, each with a stream of its own; their ledger transactions run one after another
in the database's writer thread. Nothing is acknowledged before its transaction is durable, so a task may be ended, or
its server killed, at any point: what it had read is read again.
"""
