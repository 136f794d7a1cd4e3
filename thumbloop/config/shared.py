"""Settings that server and trainer share."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class State(Section):
    """Where the store and the version folders live; the same for server and trainer."""

    folder: Path = Path("state")
    """Folder of the database, the version folders and their locks."""
    url: str | None = None
    """SQLAlchemy URL of the database, such as `postgresql+psycopg://user@host/name`; absent: SQLite, `thumbloop.db` in the folder."""

    @property
    def database_file(self) -> Path:
        """Return the file of the database, where no URL says another."""
        return self.folder / "thumbloop.db"

    @property
    def versions(self) -> Path:
        """Return the folder that holds one folder of versions per policy."""
        return self.folder / "versions"


class Model(Section):
    """The base model: trunk of policy, reference, reward model and critic."""

    path: str = ""
    """Folder in Hugging Face layout, or a model id on the hub (needs the network)."""
    revision: str | None = None
    """Revision on the hub; a commit keeps it fixed. Unused for a folder."""


class Verdict(Section):
    """The question the reward model answers, and the two tokens it may answer with.

    Absent settings take the base model's own `<|verdict|>`, `<|up|>` and `<|down|>` tokens when its
    vocabulary has them, else a question in words answered with " yes" or " no".
    """

    prompt: str | None = None
    """Text appended to prompt and response; may hold special tokens."""
    up: str | None = None
    """A text of exactly one token: a thumb up."""
    down: str | None = None
    """A text of exactly one token: a thumb down."""


class Metrics(Section):
    """The Prometheus endpoint."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: int = Field(9464, ge=0, le=65535)
    """TCP port; 0 takes a free one and prints it."""


class Logging(Section):
    """Log lines, on stderr."""

    format: Literal["text", "json"] = "text"
    """Lines for people, or a JSON object each."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe line of ours that is written; info has one for each call that ended."""
    content: bool = False
    """Write what unexpected errors say, too: they may quote prompts and replies, which nothing else does."""


class RewardComponent(Section):
    """One part of the reward."""

    kind: Literal["thumbs", "length", "format", "classifier"]
    """thumbs: what the versions learn; length: a length that is wanted; format: a form that is wanted;
    classifier: a model of yours."""
    weight: float = Field(gt=0, le=1)
    """Its share of the reward; all shares together are 1."""
    target_tokens: int = Field(0, ge=0)
    """length: the length that is wanted, tokens."""
    scale_tokens: float = Field(32.0, gt=0)
    """length: tokens off the target that cost one unit of reward, a logit."""
    pattern: str = ""
    """format: regular expression that the whole reply has to match; one that does not costs one logit."""
    path: str = ""
    """classifier: folder of a sequence-classification model in Hugging Face layout."""
    threads: int = Field(1, ge=1)
    """classifier: CPU threads; the engine's are engine.threads."""

    @field_validator("pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _has_what_its_kind_takes(self) -> Self:
        if (self.kind == "classifier") != bool(self.path):
            raise ValueError("path: a classifier needs a folder, and nothing else takes one")
        if (self.kind == "format") != bool(self.pattern):
            raise ValueError("pattern: a format needs one, and nothing else takes one")
        return self


def check_weights(rewards: dict[str, RewardComponent]) -> dict[str, RewardComponent]:
    """Return the rewards. Raises ValueError: weights that do not sum to 1, or thumbs named twice."""
    total = sum(component.weight for component in rewards.values())
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"the weights sum to {total:g}, they have to sum to 1")
    for name, component in rewards.items():
        if (component.kind == "thumbs") != (name == "thumbs"):
            raise ValueError("there is one reward model of thumbs, and it alone is named thumbs")
    return rewards


Rewards = Annotated[dict[str, RewardComponent], AfterValidator(check_weights)]
"""Components of the reward by name."""


def thumbs_alone() -> dict[str, RewardComponent]:
    """Return the reward that is nothing but the thumbs' own model."""
    return {"thumbs": RewardComponent(kind="thumbs", weight=1.0)}


class ThumbloopSettings(BaseSettings):
    """What both applications share."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_nested_delimiter="__", use_attribute_docstrings=True
    )

    seed: int = Field(0, ge=0)
    """Seed of everything random that a request does not seed itself."""
    state: State = State()
    """Where the store and the version folders live."""
    model: Model = Model()
    """The base model."""
    verdict: Verdict = Verdict()
    """The reward model's question."""
    logging: Logging = Logging()
    """Log lines, on stderr."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over the file, which arrives as init values."""
        return env_settings, init_settings
