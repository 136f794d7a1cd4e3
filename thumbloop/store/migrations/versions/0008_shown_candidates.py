"""Whether the caller got all candidates to read: who did not cannot prefer one. And an index of events by kind."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply; of replies from before it is not known, so they may be compared still."""
    shown = sa.Column("shows_candidates", sa.Boolean, nullable=False, server_default=sa.true())
    op.add_column("interactions", shown)
    op.create_index("ix_events_policy_kind_id", "events", ["policy", "kind", "id"])
