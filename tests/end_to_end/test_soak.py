"""make soak, short: server, vLLM's process and trainer are killed while people ask and rate."""

from pathlib import Path

from loadtest.midway import Midway
from loadtest.soak import wrongs
from loadtest.soak_kills import soak_kills
from thumbloop.rendering import VerdictTokens

KILLS = 5
SEED = 1
"""With it a trainer, an engine, the server and two trainers, of which the second is hardly there, are killed."""
TEXTS = tuple(f"the {thing} was good" for thing in ("film", "food", "service"))
NOT_ALWAYS = {"kills.trials", "kills.operators_moves"}
"""What so few kills do not always come to; versions are published, and thumbs learned, each time."""


def around(model: Path) -> Midway:
    """Return what the soak is given of the demo's run: here nobody asked for versions of it."""
    return Midway(
        run=model,
        model=model,
        version=model,
        other=model,
        number=1,
        thumb_up_rate=0.5,
        verdict=VerdictTokens((), 0, 0, is_special=True),
        texts=TEXTS,
        prompts=(),
    )


async def test_nothing_is_lost_by_kills_of_server_engine_and_trainer(
    tiny_model: Path, tmp_path: Path
):
    report = await soak_kills(around(tiny_model), tmp_path, kills=KILLS, seed=SEED)
    assert set(wrongs({"kills": report})) <= NOT_ALWAYS, report
    assert sum(report["kills"].values()) == KILLS
    assert all(report["kills"].values())
    assert report["calls"]["generate OK"] > report["calls"]["rate OK"] > 0
    assert report["serving_again_s"]["engine"] > 1, "what was killed did not answer"
