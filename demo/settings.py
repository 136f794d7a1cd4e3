"""Settings of the demo, and what it tells the server and the trainer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LONGEST = 1024
"""Tokens of prompt, reply and verdict together, at most."""


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
    held_out: int = 600


def server_settings(options: Options, model: Path) -> dict[str, Any]:
    """Return server.yaml: free ports, a small KV cache, room to pin the last versions, one thread.

    The trainer is to have the other core.
    """
    return {
        "seed": options.seed,
        "state": {"folder": str(options.folder / "state")},
        "model": {"path": str(model)},
        "listen": {"port": 0},
        "http": {"enabled": False},
        "metrics": {"port": 0},
        "engine": {
            "kv_cache_gib": 0.5 if options.model is None else 2.0,
            "max_model_len": _context(model),
            "max_versions": 6,
            "threads": 1,
        },
        "delivery": {"poll_interval_s": 0.1},
    }


def _context(model: Path) -> int:
    """Return how much of the model's context is served: users here say little."""
    config = json.loads((model / "config.json").read_text())
    known = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    return min(_LONGEST, *(int(length) for length in known if length))


def has_chat_template(model: Path) -> bool:
    """Say whether a model's folder tells how a conversation is written; its tokenizer may hold it."""
    settings = model / "tokenizer_config.json"
    in_settings = settings.is_file() and "chat_template" in json.loads(settings.read_text())
    return in_settings or any(model.glob("chat_template*"))


def trainer_settings(options: Options, model: Path) -> dict[str, Any]:
    """Return trainer.yaml."""
    return {
        "seed": options.seed,
        "state": {"folder": str(options.folder / "state")},
        "model": {"path": str(model)},
        "metrics": {"port": 0},
    }
