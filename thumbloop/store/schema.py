"""The store's tables. Each has one writer: the server what users do, the trainer what it learned."""

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
    true,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# -- written by the server -------------------------------------------------------------------------

interactions = Table(
    "interactions",
    metadata,
    Column("response_id", String(36), primary_key=True),
    Column("policy", String(64), nullable=False),
    Column("policy_version", Integer, nullable=False),
    Column("policy_digest", String(64), nullable=False),
    Column("reward_digest", String(64), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("user_id", String(256), nullable=False),
    Column("session_id", String(256), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("request_digest", String(64), nullable=False, server_default=""),
    Column("prompt", JSON, nullable=False),
    Column("prompt_token_ids", LargeBinary, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("strategy", String(32), nullable=False),
    Column("arm", String(16), nullable=False),
    Column("reranked", Boolean, nullable=False),
    Column("extent", String(16), nullable=False, server_default="requested"),
    Column("learning", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("trainable", Boolean, nullable=False),
    Column("untrainable_reason", String(64)),
    Column("created_at", Double, nullable=False),
    Column("duration_s", Double),
    Column("pinned", Boolean, nullable=False, server_default=false()),
    Column("shows_candidates", Boolean, nullable=False, server_default=true()),
    Index(
        "ix_interactions_policy_policy_version_created_at",
        "policy",
        "policy_version",
        "created_at",
    ),
    Index("ix_interactions_subject_user_id", "subject", "user_id"),
    Index(  # one reply for each request id of a user
        "uq_interactions_subject_user_id_request_id",
        "subject",
        "user_id",
        "request_id",
        unique=True,
        sqlite_where=text("request_digest != ''"),
        postgresql_where=text("request_digest != ''"),
    ),
)

candidates = Table(
    "candidates",
    metadata,
    Column(
        "response_id", ForeignKey("interactions.response_id", ondelete="CASCADE"), primary_key=True
    ),
    Column("position", Integer, primary_key=True),
    Column("policy_version", Integer, nullable=False),
    Column("token_ids", LargeBinary, nullable=False),  # little-endian int32
    Column("logprobs", LargeBinary, nullable=False),  # little-endian float32, of the sampler
    Column("text", Text, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("reward", Double),
    Column("propensity", Double),
    Column("chosen", Boolean, nullable=False),
    Column("stage_rewards", JSON, nullable=False, server_default="[]"),
    Column("reward_components", JSON, nullable=False, server_default="{}"),
)

feedback = Table(  # append-only: every event that was accepted
    "feedback",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("response_id", ForeignKey("interactions.response_id", ondelete="CASCADE"), index=True),
    Column("kind", String(16), nullable=False),
    Column("value", Integer, nullable=False),  # thumb: 1 up, 0 down
    Column("comment", Text, nullable=False),
    Column("subject", String(256), nullable=False),
    Column("user_id", String(256), nullable=False),
    Column("request_id", String(128)),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("subject", "user_id", "request_id"),
    sqlite_autoincrement=True,
)

thumbs = Table(  # the effective thumb: the last one of the reply's user
    "thumbs",
    metadata,
    Column(
        "response_id", ForeignKey("interactions.response_id", ondelete="CASCADE"), primary_key=True
    ),
    Column(
        "feedback_id", ForeignKey("feedback.id", ondelete="CASCADE"), nullable=False, index=True
    ),
)

preferences = Table(
    "preferences",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("response_id", ForeignKey("interactions.response_id", ondelete="CASCADE"), index=True),
    Column("better", Integer, nullable=False),
    Column("worse", Integer, nullable=False),
    Column("subject", String(256), nullable=False),
    Column("user_id", String(256), nullable=False),
    Column("request_id", String(128)),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("subject", "user_id", "request_id"),
    sqlite_autoincrement=True,
)

deployments = Table(  # what the server made of a version; no row: not looked at yet
    "deployments",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("since", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("collected_at", Double),  # null: its folder is there
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("policy", String(64), nullable=False),
    Column("version", Integer),
    Column("actor", String(256), nullable=False),
    Column("detail", JSON, nullable=False),
    Index("ix_events_policy_kind_id", "policy", "kind", "id"),
)

# -- written by the trainer ------------------------------------------------------------------------

rounds = Table(
    "rounds",
    metadata,
    Column("round_id", String(36), primary_key=True),
    Column("policy", String(64), nullable=False, index=True),
    Column("parent", Integer, nullable=False),
    Column("version", Integer),  # null: nothing was published, and `reason` says why
    Column("reason", Text, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("finished_at", Double, nullable=False),
)

round_inputs = Table(  # exactly which rows a round used, and as what
    "round_inputs",
    metadata,
    Column("round_id", ForeignKey("rounds.round_id", ondelete="CASCADE"), primary_key=True),
    # new, replay: feedback.id; preference, old_preference: preferences.id; rollout: response_id
    Column("role", String(16), primary_key=True),
    Column("row", String(36), primary_key=True),
)

policy_versions = Table(
    "policy_versions",
    metadata,
    Column("policy", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("parent", Integer),
    Column("folder", Text, nullable=False),  # relative to the folder of versions
    Column("policy_digest", String(64), nullable=False),
    Column("reward_digest", String(64), nullable=False),
    Column("manifest_digest", String(64), nullable=False),
    Column("round_id", ForeignKey("rounds.round_id")),
    Column("feedback_count", Integer, nullable=False),
    Column("first_feedback_id", Integer, nullable=False),
    Column("last_feedback_id", Integer, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("published_at", Double, nullable=False),
)
