"""The chain says which logs are new, what was declared lost and what leaves the ledger; exports keep their signature.

Nothing was released with another chain: a ledger that was begun before this is read and billed as ever, and its blocks,
whose hashes cover less, do not verify.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    nothing = sa.text("'\\x90'::bytea" if op.get_bind().dialect.name == "postgresql" else "x'90'")  # an empty list
    for name in ("logs", "lost", "dropped"):
        op.add_column("ledger_blocks", sa.Column(name, sa.LargeBinary(), server_default=nothing, nullable=False))
    op.drop_table("ledger_dropped")
    op.drop_table("ledger_exports")
    op.create_table(
        "ledger_exports",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("events", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("begun_at", sa.BigInteger(), nullable=True),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("dropped_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ledger_exports")),
    )
    op.create_index(op.f("ix_ledger_exports_month"), "ledger_exports", ["month"], unique=False)
    op.create_table(
        "ledger_remnants",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("nodes", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("shard", "number", name=op.f("pk_ledger_remnants")),
    )
