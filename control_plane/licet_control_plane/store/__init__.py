"""The system of record, in SQL: documents, revisions, licenses, marks, sidecars, the audit trail, and the ledger.

*Concurrency rule.* Every write runs in one thread, one transaction at a time, in the order asked; reads run in a few
threads, each in a transaction of its own that sees one committed state (SQLite in WAL mode). Functions here take a
``Connection`` and never commit: ``Database.write`` and ``Database.read`` own the transaction. A revision is allocated
under the lock of the ``meta`` row, which is held until the commit, so that revisions become visible in their order.
"""
