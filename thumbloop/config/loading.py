"""Reading settings: a YAML file, then the environment, which wins. Unknown keys are refused."""

import os
from pathlib import Path
from typing import Any, TypeVar

import pydantic_settings
import yaml
from pydantic import ValidationError

from thumbloop.config.shared import ThumbloopSettings
from thumbloop.errors import SettingsError

Config = TypeVar("Config", bound=ThumbloopSettings)


class _EachOnce(yaml.SafeLoader):
    """Refuses a key that is set twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises MarkedYAMLError."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is set twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(kind: type[Config], path: Path | None) -> Config:
    """Read settings from a YAML file (none: defaults) and the environment.

    Raises SettingsError: the file is missing, is no mapping, or a setting is unknown or out of range.
    """
    source = str(path) if path else "settings"
    try:
        values = _read(path) if path else {}
        config = kind(**values)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_describe(error)}") from None
    except pydantic_settings.SettingsError as error:  # a variable that holds no JSON
        raise SettingsError(f"{source}: {error}") from None
    _refuse_unknown_environment(kind)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(), _EachOnce)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"{path}: expected a mapping of settings")
    return values


def _describe(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in e['loc']) or 'settings'}: "
        + ("unknown setting" if e["type"] == "extra_forbidden" else e["msg"])
        for e in error.errors()
    )


def _refuse_unknown_environment(kind: type[ThumbloopSettings]) -> None:
    """Raise for a variable with our prefix whose first part names no setting."""
    prefix = str(kind.model_config.get("env_prefix"))
    for name in os.environ:
        if name.startswith(prefix):
            key = name.removeprefix(prefix).split("__")[0].lower()
            if key not in kind.model_fields:
                raise SettingsError(f"{name}: unknown setting in the environment")
