"""Migrations of the schema, in order. A published one is never changed."""
