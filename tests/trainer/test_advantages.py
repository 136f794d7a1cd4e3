import pytest
import torch

from thumbloop.config.trainer import Ppo
from trainer import critic, ppo
from trainer.advantages import estimate
from trainer.batches import collate
from trainer.critic import ValueHead
from trainer.measure import Fixed
from trainer.rollouts import Rollout

SCORES = torch.tensor([0.0, 2.0, 0.0])
STATES = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 50.0], [5.0, 7.0, 90.0]])
"""Of a truncated reply of two tokens, a finished one and a truncated one of one; then padding."""


def rollout(prompt: int, *response: int, is_finished: bool) -> Rollout:
    return Rollout("r", 0, (prompt,), response, (-1.0,) * len(response), 1.0, is_finished)


ROLLOUTS = [
    rollout(1, 8, 9, is_finished=False),
    rollout(2, 8, 9, is_finished=True),
    rollout(3, 8, is_finished=False),
]


class ReadOff(ValueHead):
    """A critic whose values are the states themselves."""

    def normalise(self, hidden):
        return hidden

    def of_normalised(self, states):
        return states.squeeze(-1) + 0 * self.layers[1].weight.sum()


@pytest.fixture
def head(monkeypatch) -> ValueHead:
    """A critic that reads values off the states, and that no fit changes."""
    monkeypatch.setattr(critic, "LEARNING_RATE", 0.0)
    return ReadOff(1)


def estimated(head: ValueHead, lam: float):
    """Return what the critic makes of the rollouts where no divergence is priced."""
    pairs = [(r.prompt, r.response) for r in ROLLOUTS]
    mask = collate(pairs).mask
    zeros = torch.zeros(mask.shape)
    fixed = Fixed(pairs, mask, torch.ones(3, 1), *[zeros] * 5, STATES[..., None])
    return mask, estimate(
        head,
        ROLLOUTS,
        fixed,
        SCORES,
        Ppo(lam=lam, advantage_shift=0.0),
        kl_coef=0.0,
        generator=torch.Generator().manual_seed(0),
    )


def test_a_truncated_rollout_is_worth_what_its_last_state_promises(head):
    mask, found = estimated(head, lam=0.0)
    # One step: value of the state after a token, less that of the state before. Of the finished reply's last token
    # it is the score that counts, whatever its last state promises.
    by_hand = torch.tensor([[2.0 - 1, 4 - 2], [1 - 0, 2 - 1], [7 - 5, 0]])
    torch.testing.assert_close(found.advantages, ppo.whiten(by_hand, mask))


def test_advantages_use_the_lambda_that_is_set(head):
    mask, found = estimated(head, lam=0.5)
    by_hand = torch.tensor([[1 + 0.5 * 2, 2.0], [1 + 0.5 * 1, 1], [2, 0]])
    torch.testing.assert_close(found.advantages, ppo.whiten(by_hand, mask))


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_critic_is_fitted_to_returns_of_lambda_one(head, lam):
    # Returns 4, 4, 2, 2 and 7, where values are 1, 2, 0, 1 and 5.
    _, found = estimated(head, lam)
    residual = 0.4  # the variance of 3, 2, 2, 1, 2
    assert found.explained_variance == pytest.approx(1 - residual / 3.36)
