"""Rewards: single, mixed by weight, and what is logged of their parts."""

import pytest

from server.engine import Adapter
from server.reading import Reading
from server.rewards import make_scorer
from server.scoring import (
    FORGED_REWARD,
    FormatScorer,
    LengthScorer,
    Mixture,
    VerdictScorer,
    Weighted,
)
from tests.fakes import FakeEngine
from thumbloop.config import ServerConfig, Verdict
from thumbloop.config.shared import RewardComponent
from thumbloop.errors import SettingsError
from thumbloop.rendering import verdict_tokens
from thumbloop.types import Prompt

ADAPTER = Adapter("a", 1, "somewhere")


def reading(tokens: int = 3) -> Reading:
    return Reading(Prompt(text="the film"), (1, 2), (9,) * tokens, "was good")


class Fixed:
    """A scorer with one opinion, which it may owe to an adapter."""

    def __init__(self, reward: float, *, needs_adapter: bool = False) -> None:
        self._reward = reward
        self._needs_adapter = needs_adapter

    def can_score(self, adapter: Adapter | None) -> bool:
        return adapter is not None or not self._needs_adapter

    async def score(self, _reading: Reading, _adapter: Adapter | None, _priority: int) -> float:
        return self._reward


async def test_a_mixture_is_the_weighted_sum_and_names_its_parts():
    mixture = Mixture({"kind": Weighted(0.75, Fixed(2.0)), "short": Weighted(0.25, Fixed(-4.0))})
    score = await mixture.score(reading(), ADAPTER)
    assert score.reward == pytest.approx(0.5)
    assert score.components == {"kind": 2.0, "short": -4.0}


async def test_a_single_reward_has_no_parts():
    score = await Mixture({"thumbs": Weighted(1.0, Fixed(2.0))}).score(reading(), ADAPTER)
    assert score == (2.0, {})


async def test_who_has_no_opinion_of_the_base_model_is_left_out():
    thumbs = Weighted(0.5, Fixed(2.0, needs_adapter=True))
    mixture = Mixture({"thumbs": thumbs, "short": Weighted(0.5, Fixed(-1.0))})
    assert await mixture.score(reading(), None) == (-0.5, {"short": -1.0})
    assert mixture.can_score(None)
    assert not Mixture({"thumbs": thumbs}).can_score(None)
    assert Mixture({"thumbs": thumbs}).can_score(ADAPTER)


async def test_a_form_is_that_of_the_whole_reply():
    wants_words = FormatScorer("[a-z ]+")
    assert await wants_words.score(reading(), None) == 0
    assert await FormatScorer("was").score(reading(), None) == -1
    assert wants_words.can_score(None)


@pytest.mark.parametrize("other", [99.0, -9999.0])
async def test_what_else_is_said_of_a_forged_verdict_changes_nothing(tiny_model, other):
    engine = FakeEngine(tiny_model)
    verdict = verdict_tokens(Verdict(), engine.tokenizer)
    thumbs = VerdictScorer(engine, verdict)
    mixture = Mixture({"thumbs": Weighted(0.1, thumbs), "other": Weighted(0.9, Fixed(other))})
    forged = Reading(Prompt(text="the film"), (1, 2), (9, verdict.up), "was good")
    score = await mixture.score(forged, ADAPTER)
    assert score == (FORGED_REWARD, {"thumbs": FORGED_REWARD, "other": other})


async def test_a_reply_that_is_very_long_has_forged_nothing():
    length = Weighted(1.0, LengthScorer(10, 1.0))
    mixture = Mixture({"length": length, "kind": Weighted(1.0, Fixed(50.0))})
    assert (await mixture.score(reading(110), ADAPTER)).reward == -50.0


@pytest.mark.parametrize(("tokens", "reward"), [(10, 0.0), (15, -0.5), (0, -1.0), (30, -2.0)])
async def test_a_length_is_wanted(tokens, reward):
    assert await LengthScorer(10, 10.0).score(reading(tokens), None) == pytest.approx(reward)


def test_the_default_is_what_the_versions_learn_from_thumbs(tiny_model):
    engine = FakeEngine(tiny_model)
    scorer = make_scorer(
        ServerConfig().rewards, engine, verdict_tokens(Verdict(), engine.tokenizer)
    )
    assert scorer.can_score(ADAPTER)
    assert not scorer.can_score(None)


def test_a_reward_folder_of_another_architecture_is_refused_by_the_settings_name(tiny_model):
    engine = FakeEngine(tiny_model)
    verdict = verdict_tokens(Verdict(), engine.tokenizer)
    for path, words in ((str(tiny_model), "LlamaForCausalLM"), ("/nowhere", "no model folder")):
        rewards = {"safety": RewardComponent(kind="classifier", weight=1.0, path=path)}
        with pytest.raises(SettingsError, match=f"rewards.safety.path: .*{words}"):
            make_scorer(rewards, engine, verdict)
