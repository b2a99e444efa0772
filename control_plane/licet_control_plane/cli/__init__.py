"""The ``licet`` command: operate the control plane, ask a sidecar, run a whole stack for development, replay workloads.

Each command imports what it needs when it runs, so that ``licet --help`` and a check stay quick. Results go to standard
output, as text or, with ``--json``, as one JSON object; progress, notes and errors go to standard error.
"""
