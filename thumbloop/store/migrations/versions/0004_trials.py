"""How long replies took, and which of a version came since when: what a canary is judged by."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("interactions", sa.Column("duration_s", sa.Double))
    op.create_index(
        "ix_interactions_policy_policy_version_created_at",
        "interactions",
        ["policy", "policy_version", "created_at"],
    )
    op.drop_index("ix_interactions_policy_policy_version", "interactions")
