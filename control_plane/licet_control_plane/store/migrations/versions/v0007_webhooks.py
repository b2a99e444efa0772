"""What webhooks are told of short windows, how many messages found no room, and secrets that can be rotated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhooks", sa.Column("shortest_window", sa.String(8), server_default="hour", nullable=False))
    op.add_column("webhooks", sa.Column("dropped", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("webhooks", sa.Column("nonce", sa.String(32), server_default="", nullable=False))
    op.add_column("webhooks", sa.Column("old_nonce", sa.String(32), nullable=True))
    op.add_column("webhooks", sa.Column("old_until", sa.BigInteger(), nullable=True))
