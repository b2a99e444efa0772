"""API keys with ids, tenants and ends; the audit trail as a hash chain; signing keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from licet_control_plane.core.audit_chain import GENESIS, Entry, hash_of

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _api_keys()
    _audit()
    op.create_table(
        "signing_keys",
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("public_key", sa.String(length=64), nullable=False),
        sa.Column("private", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("activated_at", sa.BigInteger(), nullable=True),
        sa.Column("resigned_at", sa.BigInteger(), nullable=True),
        sa.Column("retired_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_signing_keys")),
    )


def _api_keys() -> None:
    with op.batch_alter_table("api_keys") as table:
        table.add_column(sa.Column("key_id", sa.String(length=16), nullable=True))
        table.add_column(sa.Column("tenant", sa.String(length=128), nullable=False, server_default=""))
        table.add_column(sa.Column("created_by", sa.String(length=128), nullable=False, server_default=""))
        table.add_column(sa.Column("expires_at", sa.BigInteger(), nullable=True))
        table.add_column(sa.Column("last_used_at", sa.BigInteger(), nullable=True))
    # The keys that there are have no id in their text: the beginning of their hash says which is which.
    op.execute("UPDATE api_keys SET key_id = substr(hash, 1, 12)")
    with op.batch_alter_table("api_keys") as table:
        table.alter_column("key_id", existing_type=sa.String(length=16), nullable=False)
        table.alter_column("tenant", existing_type=sa.String(length=128), server_default=None)
        table.alter_column("created_by", existing_type=sa.String(length=128), server_default=None)
        table.create_unique_constraint(op.f("uq_api_keys_key_id"), ["key_id"])


def _audit() -> None:
    connection = op.get_bind()
    old = connection.execute(sa.text('SELECT at, "by", action, target, before, after FROM audit ORDER BY id')).all()
    op.drop_table("audit")
    audit = op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("by", sa.String(length=128), nullable=False),
        sa.Column("via", sa.String(length=16), nullable=False),
        sa.Column("credential", sa.String(length=256), nullable=False),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=256), nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("previous", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
    )
    for column in ("at", "by", "action", "tenant"):
        op.create_index(op.f(f"ix_audit_{column}"), "audit", [column], unique=False)
    head = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    op.create_table(
        "audit_checkpoints",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit_checkpoints")),
    )
    previous = GENESIS
    for number, row in enumerate(old, start=1):
        said = ("", "", "", "", row.action, row.target, "", row.before, row.after)
        entry = Entry(number, row.at, row.by, *said, previous)
        hash_ = hash_of(entry)
        values = {name: getattr(entry, name) for name in Entry.__slots__ if name != "at_us"}
        connection.execute(sa.insert(audit).values(**values, at=row.at, hash=hash_))
        previous = hash_
    connection.execute(sa.insert(head).values(id=1, number=len(old), hash=previous))
