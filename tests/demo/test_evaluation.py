"""Examinations: what is asked, of whom, and what is made of the answers."""

from types import SimpleNamespace
from typing import Any

import pytest

from demo.evaluation import Evaluation, Examiner
from demo.ledger import Ledger
from thumbloop.errors import Unavailable
from thumbloop.types import Strategy

PROMPTS = [f"prompt {n}" for n in range(600)]


class Client:
    """Answers every prompt with its number, but for those that it is told to fail."""

    def __init__(self, failing: frozenset[str] = frozenset()) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._failing = failing

    async def generate(self, prompt: str, *, user_id: str, options: Any) -> Any:
        self.asked.append((prompt, options))
        if prompt in self._failing:
            raise Unavailable("the engine is away")
        return SimpleNamespace(
            response_id=f"reply to {prompt}",
            policy_version=options.policy_version,
            text=prompt.removeprefix("prompt "),
            usage=SimpleNamespace(reply_tokens=3),
        )


def examiner(client: Client, ledger: Ledger) -> Examiner:
    """People like even numbers up to 399; a reply is well-formed where it is no 7."""

    def likes(prompt: str, reply: str) -> bool:
        assert prompt == f"prompt {reply}"
        return int(reply) % 2 == 0 and int(reply) < 400

    return Examiner(client, PROMPTS, likes, lambda reply: reply != "7", ledger)  # type: ignore[arg-type]


async def test_a_policy_is_asked_all_prompts_alone_and_pinned():
    client, ledger = Client(), Ledger()
    found = await examiner(client, ledger).policy(3)
    assert found is not None
    assert found.thumb_up_rate == pytest.approx(200 / 600)
    assert found.interval == (pytest.approx(0.297, abs=1e-3), pytest.approx(0.372, abs=1e-3))
    assert (found.mean_reply_tokens, found.well_formed_share) == (3.0, 599 / 600)
    assert sorted(prompt for prompt, _ in client.asked) == sorted(PROMPTS)
    options = client.asked[0][1]
    assert (options.policy_version, options.num_candidates) == (3, 1)
    assert (options.strategy, options.is_excluded) == (Strategy.NONE, True)
    assert len(ledger.evaluated) == 600


async def test_with_guidance_it_is_asked_a_third_of_them():
    client = Client()
    found = await examiner(client, Ledger()).guided(3)
    assert found is not None
    assert found.thumb_up_rate == 0.5
    assert sorted(prompt for prompt, _ in client.asked) == sorted(PROMPTS[:200])
    assert {o.num_candidates for _, o in client.asked} == {4}


async def test_an_examination_of_which_a_request_failed_is_none():
    client, ledger = Client(frozenset({"prompt 5"})), Ledger()
    found: Evaluation | None = await examiner(client, ledger).policy(3)
    assert found is None
    assert len(ledger.failed) == 1
