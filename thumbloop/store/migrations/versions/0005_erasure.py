"""Finds the effective thumb of an event, so that erasing events does not read all thumbs for each."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_index("ix_thumbs_feedback_id", "thumbs", ["feedback_id"])
