"""Copies what was published from the database to Redis, and vouches for it: documents, changes, limits, heads.

*Concurrency rule.* One task, ``Publisher.run``, does everything that writes documents, marks and heads, one thing at
a time, so that no two of its steps ever see Redis half changed by the other. ``AsksReader`` only collects.
"""
