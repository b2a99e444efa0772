"""``licet replay``: drive a recorded workload through sidecars and hold the ledger to the answers.

``workload`` reads the file, ``load`` asks, ``tally`` counts, ``reconcile`` compares with the ledger; ``command`` puts
them in that order.
"""
