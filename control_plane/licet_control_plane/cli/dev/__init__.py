"""``licet dev``: the whole stack on this machine, as the real programs in real processes.

``children`` starts and ends processes and leaves none behind, ``ports`` finds free ones, ``stack`` knows the programs
and the order in which they start, ``command`` is what the person at the keyboard sees.
"""
