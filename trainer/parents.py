"""Which version the next one grows from."""

from collections.abc import Sequence
from pathlib import Path

from thumbloop.config.trainer import Round
from thumbloop.lines import line
from thumbloop.types import BASE_VERSION, PolicyVersion, VersionState

_BAD = (VersionState.ROLLED_BACK, VersionState.REJECTED)


def next_parent(known: Sequence[PolicyVersion], settings: Round, folder: Path) -> PolicyVersion:
    """Return the current version; or, where that is tainted and to be rebuilt, the nearest good ancestor.

    That one is clean, was not taken back, and is still there in the folder of versions; the base model is always good.
    """
    (current,) = [v for v in known if v.state is VersionState.CURRENT]
    if not (settings.rebuild_tainted and current.is_tainted):
        return current
    return next(v for v in line(known, current) if _is_good(v, folder))


def _is_good(version: PolicyVersion, folder: Path) -> bool:
    if version.version == BASE_VERSION:
        return True
    is_clean = not version.is_tainted and version.state not in _BAD
    return is_clean and (folder / version.folder).is_dir()
