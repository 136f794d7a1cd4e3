"""Probes: synthetic sequences with the trainer's own numbers, for the server to reproduce.

Prompts are random tokens, never a user's text, one longer than three KV blocks. Of several tries
the one is kept whose greedy continuation by the child no rounding can change.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from thumbloop.artifacts import INDISTINCT, Probe
from trainer.batches import Pair, collate
from trainer.models import Adapter, Trunk

TRIES = {5: 16, 7: 16, 10: 16, 100: 6}
"""Prompt lengths, tokens, and how many prompts of each are tried: short ones cost little, and of sixteen one has a
continuation that half precision does not change. A KV block holds 32. Few and short: they are read beside users' requests."""
CONTINUATION = 5
"""Tokens of a continuation, fewer where the child ends its reply."""

Weights = Mapping[Adapter, Mapping[str, Tensor]]


class Probes(NamedTuple):
    """The probes of a version, and how far each adapter is from the parent's; None is unchanged."""

    probes: tuple[Probe, ...]
    policy_distance: float | None
    reward_distance: float | None


class Numbers(NamedTuple):
    """What one version says of the probes: log-probabilities per row, and rewards."""

    logprobs: list[list[float]]
    rewards: list[float]


def make(
    trunk: Trunk,
    parent: Weights,
    *,
    vocabulary: Sequence[int],
    end: Sequence[int],
    generator: torch.Generator,
) -> Probes:
    """Compute the probes of the version in the trunk, and its parent's numbers for them.

    `vocabulary` holds the token ids that prompts are drawn from, `end` those that end a reply.
    """
    pairs = draw(trunk, vocabulary, end, generator)
    child = numbers(trunk, pairs)
    own = {adapter: trunk.snapshot(adapter) for adapter in parent}
    for adapter, weights in parent.items():
        trunk.restore(adapter, weights)
    before = numbers(trunk, pairs)
    for adapter, weights in own.items():
        trunk.restore(adapter, weights)
    probes = tuple(
        Probe(
            prompt=prompt,
            continuation=continuation,
            logprobs=tuple(child.logprobs[i]),
            parent_logprobs=tuple(before.logprobs[i]),
            reward=child.rewards[i],
            parent_reward=before.rewards[i],
        )
        for i, (prompt, continuation) in enumerate(pairs)
    )
    return Probes(
        probes,
        distance(list(chain(*child.logprobs)), list(chain(*before.logprobs))),
        distance(child.rewards, before.rewards),
    )


def draw(
    trunk: Trunk, vocabulary: Sequence[int], end: Sequence[int], generator: torch.Generator
) -> list[Pair]:
    """Draw one prompt per length, with the child's surest greedy continuation of several tries."""
    room = trunk.context - CONTINUATION - len(trunk.verdict.prompt)
    ids = torch.tensor(list(vocabulary))
    prompts = [
        tuple(ids[torch.randint(len(ids), (min(length, room),), generator=generator)].tolist())
        for length, count in TRIES.items()
        for _ in range(count)
    ]
    tries = iter(continue_greedily(trunk, prompts, end))
    of_lengths = [[*islice(tries, count)] for count in TRIES.values()]
    return [max(each, key=lambda pair_and_margin: pair_and_margin[1])[0] for each in of_lengths]


@torch.no_grad()
def continue_greedily(
    trunk: Trunk, prompts: Sequence[tuple[int, ...]], end: Sequence[int]
) -> list[tuple[Pair, float]]:
    """Return each prompt with its continuation, and the least lead of a chosen token, in nats."""
    continuations: list[tuple[int, ...]] = [()] * len(prompts)
    margins = [float("inf")] * len(prompts)
    for _ in range(CONTINUATION):
        logits = trunk.next_logits(
            collate(list(zip(prompts, continuations, strict=True))).to(trunk.device)
        )
        values, tokens = logits.topk(2, dim=-1)
        leads = (values[:, 0] - values[:, 1]).tolist()
        for i, token in enumerate(tokens[:, 0].tolist()):
            if not continuations[i] or continuations[i][-1] not in end:
                continuations[i] = (*continuations[i], token)
                margins[i] = min(margins[i], leads[i])
    return [
        ((prompt, continuation), margin)
        for prompt, continuation, margin in zip(prompts, continuations, margins, strict=True)
    ]


@torch.no_grad()
def numbers(trunk: Trunk, pairs: Sequence[Pair]) -> Numbers:
    """Return the trunk's log-probabilities of the continuations at temperature 1, and rewards."""
    batch = collate(pairs).to(trunk.device)
    one = torch.ones(len(pairs), 1, device=trunk.device)
    logprobs = trunk.respond(batch, one, "policy").logprobs.cpu()
    rewards = trunk.rewards(
        collate([(p, (*c, *trunk.verdict.prompt)) for p, c in pairs]).to(trunk.device)
    )
    rows = [row[: len(c)].tolist() for row, (_, c) in zip(logprobs, pairs, strict=True)]
    return Numbers(rows, rewards.tolist())


def distance(child: Sequence[float], parent: Sequence[float]) -> float | None:
    """Return the mean absolute difference, None when it is no more than rounding."""
    mean = sum(abs(a - b) for a, b in zip(child, parent, strict=True)) / len(child)
    return mean if mean > INDISTINCT else None
