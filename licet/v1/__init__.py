"""Generated from ``proto/licet/v1``: messages, services and their types. ``make proto`` writes them; edit nothing."""
