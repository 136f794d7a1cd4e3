"""Finding the strategies: every module of a package that has a `STRATEGY`."""

import importlib
import pkgutil
from types import ModuleType

from server.guidance.outcome import Guidance
from thumbloop.errors import SettingsError


def find_strategies(package: ModuleType | None = None) -> dict[str, Guidance]:
    """Return every strategy by name; of `server.guidance` unless told otherwise.

    Raises SettingsError: two have the same name.
    """
    package = package or importlib.import_module(__package__)
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    strategies: dict[str, Guidance] = {}
    for module in modules:
        if hasattr(module, "STRATEGY"):
            name = str(module.STRATEGY.name)
            if name in strategies:
                raise SettingsError(f"guidance: two strategies are called {name}")
            strategies[name] = module.STRATEGY
    return strategies
