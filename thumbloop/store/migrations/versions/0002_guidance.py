"""How many candidates a request had and why, partial rewards, and the parts of a reward."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    extent = sa.Column("extent", sa.String(length=16), nullable=False, server_default="requested")
    op.add_column("interactions", extent)
    for name, empty in (("stage_rewards", "[]"), ("reward_components", "{}")):
        column = sa.Column(name, sa.JSON(), nullable=False, server_default=empty)
        op.add_column("candidates", column)
