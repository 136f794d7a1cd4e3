"""The critic: a value head fitted on the reference's frozen hidden states.

The states do not change while the policy does, so the head is fitted once a round, before the
policy moves, and no gradient of it can reach an adapter.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from trainer.ppo import value_loss

EPOCHS = 20
LEARNING_RATE = 2e-3
MINIBATCH_TOKENS = 1024


class ValueHead(nn.Module):
    """The critic: values (B, T) from the trunk's frozen hidden states (B, T, H)."""

    def __init__(self, hidden_size: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the expected return of each state."""
        values: Tensor = self.layers(hidden.float())
        return values.squeeze(-1)


def fit(
    head: ValueHead,
    hidden: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    generator: torch.Generator,
) -> ValueHead:
    """Return a copy of the head fitted to returns (B, T) on hidden states (B, T, H).

    The clip holds each epoch near the values at its start.
    """
    head = deepcopy(head)
    states, targets = hidden[mask], returns[mask]
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        with torch.no_grad():
            old_values = head(states)
        order = torch.randperm(len(states), generator=generator).to(states.device)
        for rows in order.split(MINIBATCH_TOKENS):
            everything = torch.ones_like(rows, dtype=torch.bool)
            loss = value_loss(
                head(states[rows]), old_values[rows], targets[rows], everything, clip=clip
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


@torch.no_grad()
def cross_fitted_values(heads: Sequence[ValueHead], folds: Tensor, hidden: Tensor) -> Tensor:
    """Return values (B, T), each row from the head of its fold, which was fitted without it."""
    values = torch.zeros(hidden.shape[:2], device=hidden.device)
    for fold, head in enumerate(heads):
        values[folds == fold] = head(hidden[folds == fold])
    return values
