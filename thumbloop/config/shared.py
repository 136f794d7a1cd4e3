"""Settings that server and trainer share."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class State(Section):
    """Where the store and the version folders live; the same for server and trainer."""

    folder: Path = Path("state")
    """Folder of the database, the version folders and their locks."""
    url: str | None = None
    """SQLAlchemy URL of the database; absent: SQLite, `thumbloop.db` in the folder."""

    @property
    def database_url(self) -> str:
        """Return the URL of the database."""
        return self.url or f"sqlite:///{self.folder / 'thumbloop.db'}"

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
