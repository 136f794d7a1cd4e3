"""All checks, in the order in which one would look. A new one is a function, and its name in the list."""

from collections.abc import Callable, Iterator
from pathlib import Path

from thumbloop.config import ServerConfig, TrainerConfig, load
from thumbloop.doctor import (
    agreement,
    locks,
    machine,
    model,
    ports,
    registry,
    secrets,
    software,
    store,
)
from thumbloop.doctor.findings import Finding, Subject, ok, wrong
from thumbloop.errors import SettingsError

Check = Callable[[Subject], Finding]

OF_SOFTWARE: dict[str, Check] = {
    "python": software.python,
    "thumbloop": software.wheel,
    "package torch": software.torch,
    "package vllm": software.vllm,
    "package transformers": software.transformers,
    "package peft": software.peft,
}
"""What can be looked at without settings."""

OF_INSTALLATION: dict[str, Check] = {
    "agreement": agreement.agreement,
    "model": model.model,
    "state folder": store.folder,
    "file system": store.file_system,
    "disk": store.disk,
    "database": store.database,
    "base model": model.base,
    "current version": registry.current,
    "versions": registry.folders,
    "leftovers": registry.leftovers,
    "locks": locks.state,
    "leases": locks.leases,
    "gRPC port": ports.listen,
    "HTTP port": ports.http,
    "metrics port": ports.metrics,
    "trainer's metrics port": ports.trainer_metrics,
    "gpu": machine.gpu,
    "cpu": machine.cpu,
    "memory": machine.memory,
    "clock": store.clock,
    "server's clock": ports.clock,
    "tokens": secrets.tokens,
    "TLS": secrets.tls,
    "settings' files": secrets.settings_files,
}


def examine(server: Path | None, trainer: Path | None) -> Iterator[Finding]:
    """Yield what each check finds, as soon as it does; without sound settings only what needs none."""
    nothing = Subject(ServerConfig.model_construct())
    yield from (_look(name, check, nothing) for name, check in OF_SOFTWARE.items())
    try:
        config = load(ServerConfig, server)
        other = None if trainer is None else load(TrainerConfig, trainer)
    except SettingsError as error:
        yield wrong("settings", str(error), "docs/configuration.md has every setting")
        return
    files = tuple(path for path in (server, trainer) if path is not None)
    yield ok("settings", ", ".join(map(str, files)) or "defaults and the environment")
    subject = Subject(config, other, files)
    yield from (_look(name, check, subject) for name, check in OF_INSTALLATION.items())


def _look(name: str, check: Check, subject: Subject) -> Finding:
    """Return what a check finds; one that breaks says so, and the others go on."""
    try:
        return check(subject)
    except Exception as error:
        found = f"could not be looked at: {type(error).__name__}: {error}"
        return wrong(name, found, "mend what this says, and look again")
