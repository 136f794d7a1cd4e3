"""docs/configuration.md, written from the settings themselves: python -m thumbloop.config.reference."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from thumbloop.config.server import ServerConfig
from thumbloop.config.shared import ThumbloopSettings
from thumbloop.config.trainer import TrainerConfig

_HEAD = """# Configuration

Written by `python -m thumbloop.config.reference` from the settings themselves; do not edit.

Settings come from a YAML file (`--config`) and from the environment, which wins: the prefix, then the
path with `__` between its parts, as in `THUMBLOOP_SERVER_GUIDANCE__AUDIT_SHARE=0.05`. An unknown setting
is an error. Server and trainer need the same `state`, `model` and `verdict`.
"""


def reference() -> str:
    """Return the page: one table per application, one row per setting."""
    return "\n".join(
        [_HEAD, *_application("server", ServerConfig), *_application("trainer", TrainerConfig)]
    )


def _application(name: str, settings: type[ThumbloopSettings]) -> Iterator[str]:
    prefix = settings.model_config.get("env_prefix")
    yield f"## `python -m {name}`\n\nEnvironment prefix: `{prefix}`\n"
    yield "| setting | default | range | meaning |\n|---|---|---|---|"
    for path, field, default in _leaves(settings, settings()):
        limits = ", ".join(_limits(field))
        meaning = " ".join((field.description or "").split())
        shown = str(default).replace("|", r"\|")
        yield f"| `{path}` | `{shown}` | {limits} | {meaning} |"
    yield ""


def _leaves(
    section: type[BaseModel], values: BaseModel, path: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield every setting that is not a section: path, field, default."""
    for name, field in section.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            yield from _leaves(type(value), value, f"{path}{name}.")
        else:
            yield f"{path}{name}", field, "absent" if value is None else value


def _limits(field: FieldInfo) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    if get_origin(field.annotation) is Literal:
        yield " / ".join(f"`{choice}`" for choice in get_args(field.annotation))
    for constraint in field.metadata:
        for name, sign in signs.items():
            bound = getattr(constraint, name, None)
            if bound is not None:
                yield f"{sign} {bound}"


if __name__ == "__main__":
    print(reference(), end="")
