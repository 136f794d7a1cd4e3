"""What tells a retry of a request from another request under the same id."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_HAS_DIGEST = sa.text("request_digest != ''")


def upgrade() -> None:
    """Apply."""
    digest = sa.Column("request_digest", sa.String(64), nullable=False, server_default="")
    op.add_column("interactions", digest)
    op.create_index(
        "uq_interactions_subject_user_id_request_id",
        "interactions",
        ["subject", "user_id", "request_id"],
        unique=True,
        sqlite_where=_HAS_DIGEST,
        postgresql_where=_HAS_DIGEST,
    )
