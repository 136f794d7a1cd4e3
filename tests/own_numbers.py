"""Whether a reply is its version's own, by the numbers of transformers and PEFT."""

from pathlib import Path

import pytest

from tests.publishing import RealSpeaker
from thumbloop.rendering import VerdictTokens
from thumbloop.types import Interaction

EQUAL = {"abs": 1e-4}


def check_numbers(
    row: Interaction, folder: Path | None, speaker: RealSpeaker, verdict: VerdictTokens
) -> None:
    """Compare every candidate's log-probabilities and reward; `folder` None is the base model."""
    prompt = row.prompt_token_ids
    for candidate in row.candidates:
        assert candidate.policy_version == row.policy_version
        expected = speaker.logprobs(
            folder / "policy" if folder else None, prompt, candidate.token_ids
        )
        assert candidate.logprobs == pytest.approx(expected, **EQUAL), row.policy_version
        if folder is None:
            assert candidate.reward is None
        elif not verdict.is_forged_in(candidate.token_ids):
            read = verdict.wrap(prompt, candidate.token_ids)
            up, down = speaker.next_logprobs(folder / "reward", read, (verdict.up, verdict.down))
            assert candidate.reward == pytest.approx(up - down, abs=2e-4)
