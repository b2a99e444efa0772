"""What Licet costs, measured beside a peer in the same run. ``make bench``; see ``bench/README.md``."""
