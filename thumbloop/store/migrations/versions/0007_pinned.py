"""Whether the caller named the version that answered: nobody's routing gave it to them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    pinned = sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("interactions", pinned)
