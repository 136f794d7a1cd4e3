"""make soak, short: versions are swapped, and server, vLLM's process and trainer killed, while people ask."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loadtest import soak_swaps
from loadtest.midway import Midway
from loadtest.soak import wrongs
from loadtest.soak_kills import soak_kills
from tests.publishing import Publisher, RealSpeaker
from thumbloop.config import State, Verdict
from thumbloop.rendering import VerdictTokens, verdict_tokens

PROMPTS = 12
NONE = Path("none")
KILLS = 5
SEED = 1
"""With it a trainer, an engine, the server and two trainers, of which the second is hardly there, are killed."""
TEXTS = tuple(f"the {thing} was good" for thing in ("film", "food", "service", "book"))
NOT_ALWAYS = {"kills.trials", "kills.operators_moves"}
"""What so few kills do not always come to; versions are published, and thumbs learned, each time."""


def around(model: Path, version: Path = NONE, other: Path = NONE) -> Midway:
    """Return what the soak is given of a run of the demo."""
    return Midway(
        run=model,
        model=model,
        version=version,
        other=other,
        number=1,
        thumb_up_rate=0.5,
        verdict=VerdictTokens((), 0, 0, is_special=True),
        texts=TEXTS,
        prompts=(),
    )


async def test_swaps_and_rollbacks_mix_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(soak_swaps, "_PROMPTS", PROMPTS)
    monkeypatch.setattr(soak_swaps, "_LONGEST_CHARACTERS", 200)  # tokens of this model are letters
    tokens = verdict_tokens(Verdict(), AutoTokenizer.from_pretrained(tiny_model))
    learned = State(folder=tmp_path / "learned")
    publisher = Publisher(tiny_model, learned.versions, None, tokens, RealSpeaker(tiny_model))
    folders = [learned.versions / publisher.write(number).folder for number in (1, 2)]
    found = around(tiny_model, *folders)
    counts = {"swaps": 4, "requests": 30, "apart": 2, "rollbacks": 2}
    report = await soak_swaps.soak_swaps(found, tmp_path, **counts, seed=0)
    assert wrongs({"swaps": report}) == [], report
    assert report["swaps"] == 4 + 2 + 2
    assert report["requests"] >= 30
    assert report["prompts_told_apart"] > PROMPTS / 2
    assert report["apart"]["publish_to_first_reply_s"]["p50"] > 0
    assert report["rollbacks"]["rollbacks"] == 2


async def test_nothing_is_lost_by_kills_of_server_engine_and_trainer(
    tiny_model: Path, tmp_path: Path
):
    report = await soak_kills(around(tiny_model), tmp_path, kills=KILLS, seed=SEED)
    assert set(wrongs({"kills": report})) <= NOT_ALWAYS, report
    assert sum(report["kills"].values()) == KILLS
    assert all(report["kills"].values())
    assert report["calls"]["generate OK"] >= report["calls"]["rate OK"] > 0
    assert report["serving_again_s"]["engine"] > 1, "what was killed did not answer"
