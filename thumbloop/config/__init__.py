"""Every setting: default, unit, one-line meaning.

Settings come from a YAML file and from environment variables
(`THUMBLOOP_SERVER_GUIDANCE__AUDIT_SHARE`, `THUMBLOOP_TRAINER_ROUND__MIN_FEEDBACK`).
"""

from thumbloop.config.loading import load
from thumbloop.config.server import ServerConfig
from thumbloop.config.shared import Model, State, ThumbloopSettings, Verdict
from thumbloop.config.trainer import TrainerConfig

__all__ = [
    "Model",
    "ServerConfig",
    "State",
    "ThumbloopSettings",
    "TrainerConfig",
    "Verdict",
    "load",
]
