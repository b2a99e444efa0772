"""The life of licenses, idempotency keys, and webhooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("grace_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cancels", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("renewal", sa.Text(), server_default="", nullable=False),
        sa.Column("planned_plan", sa.String(128), server_default="", nullable=False),
        sa.Column("planned_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("expiring_for_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("expired_for_s", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("due_s", sa.BigInteger(), nullable=True),
    ):
        op.add_column("licenses", column)
    op.create_index(op.f("ix_licenses_due_s"), "licenses", ["due_s"])
    # What is due when, the server works out when it looks at each.
    op.execute("UPDATE licenses SET due_s = 0 WHERE ends_s > 0")
    _idempotency_keys()
    _webhooks()


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


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", sa.Text(), nullable=False),
        sa.Column("thresholds", sa.Text(), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.Column("disabled_at", sa.BigInteger(), nullable=True),
        sa.Column("disabled_why", sa.Text(), nullable=False),
        sa.Column("failing_since", sa.BigInteger(), nullable=True),
        sa.Column("busy_until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhooks")),
    )
    op.create_table(
        "webhook_messages",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_webhook_messages")),
        sa.UniqueConstraint("id", name=op.f("uq_webhook_messages_id")),
    )
    op.create_index(op.f("ix_webhook_messages_at"), "webhook_messages", ["at"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("webhook", sa.String(32), nullable=False),
        sa.Column("message", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("delivered_at", sa.BigInteger(), nullable=True),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("webhook", "message", name=op.f("pk_webhook_deliveries")),
    )
    op.create_index(op.f("ix_webhook_deliveries_webhook_next_at"), "webhook_deliveries", ["webhook", "next_at"])
    op.create_index(op.f("ix_webhook_deliveries_message"), "webhook_deliveries", ["message"])
    op.create_table(
        "quota_notices",
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("quota", sa.String(384), nullable=False),
        sa.Column("percent", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ends_s", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "quota", "percent", name=op.f("pk_quota_notices")),
    )
    op.create_index(op.f("ix_quota_notices_ends_s"), "quota_notices", ["ends_s"])
