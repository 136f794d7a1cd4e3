"""Our own server as a load test sees it: through the client, at any address."""

from collections.abc import Sequence
from dataclasses import replace

from loadtest.workload import Answer
from thumbloop.client import AsyncClient, GenerateOptions
from thumbloop.types import Strategy

USERS = 50


class Thumbloop:
    """Asks our server, as many users in turn; one strategy and number of candidates per `asking`.

    `deadline_s` is that of each call; None: the client's own.
    """

    def __init__(
        self,
        client: AsyncClient,
        prompts: Sequence[str],
        *,
        is_text: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._is_text = is_text
        self._deadline_s = deadline_s

    async def ask(self, number: int, options: GenerateOptions) -> Answer:
        """Ask the question of this number, never to be learned from."""
        reply = await self._client.generate(
            self._prompts[number % len(self._prompts)],
            is_text=self._is_text,
            user_id=f"load-{number % USERS}",
            options=replace(options, is_excluded=True),
            timeout_s=self._deadline_s,
        )
        rewards = [c.reward for c in reply.candidates if c.HasField("reward")]
        return Answer(
            reply_tokens=reply.usage.reply_tokens,
            decoded_tokens=reply.usage.candidate_tokens,
            policy_version=reply.policy_version,
            reward=reply.reward if reply.HasField("reward") else None,
            candidate_rewards=tuple(rewards),
            num_candidates=reply.num_candidates,
            reranked=reply.reranked,
        )


PLAIN = GenerateOptions(strategy=Strategy.NONE, num_candidates=1)
"""One candidate, shown as it is."""


def guided(strategy: Strategy, num_candidates: int) -> GenerateOptions:
    """Ask with a strategy, and for all candidates' rewards."""
    return GenerateOptions(
        strategy=strategy, num_candidates=num_candidates, include_candidates=True
    )
