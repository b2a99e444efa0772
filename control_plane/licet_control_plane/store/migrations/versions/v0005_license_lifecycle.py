"""The life of licenses, and idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("grace_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cancels", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("renewal", sa.Text(), server_default="", nullable=False),
        sa.Column("planned_plan", sa.String(128), server_default="", nullable=False),
        sa.Column("planned_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("due_s", sa.BigInteger(), nullable=True),
    ):
        op.add_column("licenses", column)
    op.create_index(op.f("ix_licenses_due_s"), "licenses", ["due_s"])
    _idempotency_keys()


def _idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("caller", sa.String(64), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("committed", sa.Boolean(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("headers", sa.Text(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("caller", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_at"), "idempotency_keys", ["at"])
