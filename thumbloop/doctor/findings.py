"""What a check says, and of what."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from thumbloop.config import ServerConfig, TrainerConfig


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what helps where something is amiss."""

    check: str
    level: Level
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    """Return that all is well."""
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, advice: str) -> Finding:
    """Return what works, and may not for long or not well."""
    return Finding(check, Level.WARNING, found, advice)


def wrong(check: str, found: str, advice: str) -> Finding:
    """Return what does not work."""
    return Finding(check, Level.WRONG, found, advice)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: the settings of a server, those of a trainer, and where they were read from."""

    server: ServerConfig
    trainer: TrainerConfig | None = None
    files: tuple[Path, ...] = ()

    @property
    def configs(self) -> tuple[ServerConfig | TrainerConfig, ...]:
        """Return the settings of each application."""
        return (self.server,) if self.trainer is None else (self.server, self.trainer)
