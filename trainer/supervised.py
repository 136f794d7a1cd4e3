"""The supervised warm start: behaviour cloning on replies with a thumb up, each by its weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thumbloop.config.trainer import Supervised
from trainer.measure import batches_of, of_responses
from trainer.models import Trunk
from trainer.ppo import NotFinite
from trainer.rollouts import Thumb


def imitate(
    trunk: Trunk,
    thumbs: Sequence[Thumb],
    weights: Tensor,
    settings: Supervised,
    generator: torch.Generator,
) -> float:
    """Raise the policy's likelihood of what users liked; return the last pass's mean loss, nats per token.

    weights (N,), as for the reward model: a reply that guidance liked to show is no more worth imitating
    than one it hardly did. Cross-entropy on response tokens, as the first stage of Ouyang et al. 2022
    (arXiv 2203.02155, section 3.5). No thumb up: nothing to do, and a loss of 0.
    """
    liked = [i for i, thumb in enumerate(thumbs) if thumb.is_up]
    parameters = list(trunk.parameters("policy").values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    losses: list[float] = []
    for _ in range(settings.epochs if liked else 0):
        order = torch.randperm(len(liked), generator=generator)
        losses = []
        for places in order.split(settings.batch_size):
            rows = [liked[int(i)] for i in places]
            loss = _loss(trunk, [thumbs[i] for i in rows], weights[rows])
            optimizer.zero_grad()
            trunk.workers.descend(loss, parameters)
            if not torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
                raise NotFinite("the gradient of the supervised warm start is not finite")
            optimizer.step()
            losses.append(float(loss.detach()))
    return sum(losses) / len(losses) if losses else 0.0


def _loss(trunk: Trunk, thumbs: Sequence[Thumb], weights: Tensor) -> Tensor:
    """Return the weighted mean of the responses' negative log-likelihood per token."""
    per_reply = torch.zeros(len(thumbs), device=trunk.device)
    for rows, batch in batches_of(trunk, [(t.prompt, t.response) for t in thumbs]):
        temperature = torch.ones(len(rows), 1, device=trunk.device)
        logprobs = trunk.respond(batch, temperature, "policy").logprobs
        means = of_responses(logprobs, batch.mask) / batch.mask.sum(dim=1)
        per_reply = per_reply.index_copy(0, rows.to(trunk.device), -means)
    shares = weights.to(trunk.device) / weights.sum().clamp(min=1e-8)
    return (shares * trunk.workers.join(per_reply)).sum()
