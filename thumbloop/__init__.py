"""Thumbloop: the contracts shared by the server, the trainer and their clients."""

__version__ = "0.1.0"
