"""Settings of the demo, and what it tells the server and the trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    preference: str
    seed: int
    rounds: int
    shuffled: bool
    model: str | None
    folder: Path
    max_minutes: float
    held_out: int = 200


def server_settings(options: Options, model: Path) -> dict[str, Any]:
    """Return server.yaml: free ports, a small KV cache, room to pin the last versions, one thread.

    The trainer is to have the other core.
    """
    return {
        "seed": options.seed,
        "state": {"folder": str(options.folder / "state")},
        "model": {"path": str(model)},
        "listen": {"port": 0},
        "metrics": {"port": 0},
        "engine": {"kv_cache_gib": 0.5, "max_versions": 6, "threads": 1},
        "delivery": {"poll_interval_s": 0.1},
    }


def trainer_settings(options: Options, model: Path) -> dict[str, Any]:
    """Return trainer.yaml."""
    return {
        "seed": options.seed,
        "state": {"folder": str(options.folder / "state")},
        "model": {"path": str(model)},
        "metrics": {"port": 0},
    }
