"""The critic: a value head fitted on the reference's frozen hidden states.

The states do not change while the policy does, so the head is fitted once a round, before the
policy moves, and no gradient of it can reach an adapter.
"""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        return self.of_normalised(self.normalise(hidden))

    def normalise(self, hidden: Tensor) -> Tensor:
        """Return states of mean 0 and variance 1, which no weight of the head has a part in."""
        return F.layer_norm(hidden.float(), hidden.shape[-1:])

    def of_normalised(self, states: Tensor) -> Tensor:
        """Return the expected return of each normalised state; the norm's own weights go into the matrix after it."""
        norm, first = self.layers[0], self.layers[1]
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(first, nn.Linear)
        bias = first.bias + first.weight @ norm.bias
        values: Tensor = self.layers[2:](F.linear(states, first.weight * norm.weight, bias))
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
    states, targets = head.normalise(hidden[mask]), returns[mask]
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        with torch.no_grad():
            old_values = head.of_normalised(states)
        order = torch.randperm(len(states), generator=generator).to(states.device)
        for rows in order.split(MINIBATCH_TOKENS):
            everything = torch.ones_like(rows, dtype=torch.bool)
            values = head.of_normalised(states.index_select(0, rows))
            loss = value_loss(values, old_values[rows], targets[rows], everything, clip=clip)
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
