"""Fixtures of several packages: a tiny model on disk, and an engine that needs none."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_model import build_tiny_model  # seconds of imports, not for every test

    return build_tiny_model(tmp_path_factory.mktemp("model"))
