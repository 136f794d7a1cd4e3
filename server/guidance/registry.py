"""Finding the strategies: every module of a package that has a `STRATEGY`."""

import importlib
import pkgutil
from types import ModuleType

from server.guidance.outcome import Guidance


def find_strategies(package: ModuleType | None = None) -> dict[str, Guidance]:
    """Return every strategy by name; of `server.guidance` unless told otherwise."""
    package = package or importlib.import_module(__package__)
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    strategies: list[Guidance] = [m.STRATEGY for m in modules if hasattr(m, "STRATEGY")]
    return {str(strategy.name): strategy for strategy in strategies}
