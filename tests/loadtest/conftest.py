from pathlib import Path
from typing import Any

import pytest

from loadtest.midway import Midway
from loadtest.work import Work


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Two repeats with version 2 of a run in `policy`."""
    nothing: Any = None
    found = Midway(
        run=tmp_path / "policy",
        model=Path("model"),
        version=Path("version"),
        other=Path("other"),
        number=2,
        thumb_up_rate=0.5,
        verdict=nothing,
        texts=(),
        prompts=(),
    )
    return Work(found, repeats=2, folder=tmp_path, shared=tmp_path / "shared")
