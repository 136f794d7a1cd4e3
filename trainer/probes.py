"""Probes: synthetic sequences with the trainer's own numbers, for the server to reproduce.

Prompts are random tokens, never a user's text, one longer than three KV blocks. Of many tries those are kept whose
greedy continuation by the child no rounding can change, and of these the ones that tell it from its parent best.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from thumbloop.artifacts import MOST_PROBES, Probe
from thumbloop.rounding import INDISTINCT, WANTED_SURENESS, sureness
from trainer.batches import Pair, collate
from trainer.models import Adapter, Trunk

TRIES = {5: 16, 7: 16, 10: 16, 100: 6}
"""Prompt lengths, tokens, and how many prompts of each are tried at once: short ones cost little. A KV block holds 32.
Of each length one is a probe. Few and short: they are read beside users' requests."""
CONTINUATION = 5
"""Tokens of a continuation, fewer where the child ends its reply."""
_DRAWS = 4
_SURE_LEAD, _SURE_LEAD_OF_HALF = 0.5, 1.0
"""Nats by which each token has to lead the next likely, in a trainer that computes in float32, and in one that rounds
itself. Of 523 continuations with the first bfloat16 in the engine moved none, with 0.3 some."""
_ROUGHEST = "bfloat16"  # of what a server may compute in

Weights = Mapping[Adapter, Mapping[str, Tensor]]
_Both = tuple[Sequence[float], Sequence[float]]


class Probes(NamedTuple):
    """The probes of a version, and how far each adapter is from the parent's; None is unchanged."""

    probes: tuple[Probe, ...]
    policy_distance: float | None
    reward_distance: float | None


class Numbers(NamedTuple):
    """What one version says of the probes: log-probabilities per row, and rewards."""

    logprobs: list[list[float]]
    rewards: list[float]


class Try(NamedTuple):
    """What may become a probe. `length` is its prompt's in TRIES, `lead` the least of its continuation's tokens, nats;
    whether that `is_sure`, whatever the rounding.
    """

    length: int
    lead: float
    is_sure: bool
    probe: Probe


def make(
    trunk: Trunk,
    parent: Weights,
    *,
    vocabulary: Sequence[int],
    end: Sequence[int],
    generator: torch.Generator,
) -> Probes:
    """Compute the probes of the version in the trunk, and its parent's numbers for them.

    A step that is small beside rounding takes more of them, MOST_PROBES at most. `vocabulary` holds the token
    ids that prompts are drawn from, `end` those that end a reply.
    """
    tries: list[Try] = []
    for _ in range(_DRAWS):
        tries += draw(trunk, parent, vocabulary, end, generator)
        probes, is_enough = choose(tries, trunk.dtype_name)
        if is_enough:
            break
    return Probes(
        tuple(probes),
        distance(*_together(probes, _policy)),
        distance(*_together(probes, _reward)),
    )


def draw(
    trunk: Trunk,
    parent: Weights,
    vocabulary: Sequence[int],
    end: Sequence[int],
    generator: torch.Generator,
) -> list[Try]:
    """Draw prompts of each length, with the child's greedy continuations and both versions' numbers."""
    room = trunk.context - CONTINUATION - len(trunk.verdict.prompt)
    ids = torch.tensor(list(vocabulary))
    lengths = [length for length, count in TRIES.items() for _ in range(count)]
    prompts = [
        tuple(ids[torch.randint(len(ids), (min(length, room),), generator=generator)].tolist())
        for length in lengths
    ]
    continued = continue_greedily(trunk, prompts, end)
    least = _SURE_LEAD if trunk.dtype_name == "float32" else _SURE_LEAD_OF_HALF
    kept = _usable(lengths, [lead for _, lead in continued], least)
    pairs = [continued[i][0] for i in kept]
    child, before = numbers(trunk, pairs), _parents_numbers(trunk, parent, pairs)
    return [
        Try(
            lengths[i],
            continued[i][1],
            continued[i][1] >= least,
            Probe(
                prompt=prompt,
                continuation=continuation,
                logprobs=tuple(child.logprobs[row]),
                parent_logprobs=tuple(before.logprobs[row]),
                reward=child.rewards[row],
                parent_reward=before.rewards[row],
            ),
        )
        for row, (i, (prompt, continuation)) in enumerate(zip(kept, pairs, strict=True))
    ]


def _usable(lengths: Sequence[int], leads: Sequence[float], least: float) -> list[int]:
    """Return the places of what continues surely, by `least` nats, and of the surest of each length."""
    surest: dict[int, float] = {}
    for length, lead in zip(lengths, leads, strict=True):
        surest[length] = max(lead, surest.get(length, lead))
    each = enumerate(zip(lengths, leads, strict=True))
    return [i for i, (length, lead) in each if lead >= min(least, surest[length])]


def choose(tries: Sequence[Try], dtype: str) -> tuple[list[Probe], bool]:
    """Return a probe of each length, then as many more as it takes to tell both adapters from the parent's.

    Also whether they do, to a server that computes in half precision. `dtype` is the trainer's. Only what surely
    continues as it should is taken, but for a length of which nothing does.
    """
    chosen = [max((t for t in tries if t.length == length), key=_rank) for length in TRIES]
    others = [t for t in tries if t.is_sure and t not in chosen]
    are_told_apart = []
    for of in (_policy, _reward):
        rest = sorted((t for t in others if t not in chosen), key=lambda t: _step(t, of))
        is_changed = distance(*_together([t.probe for t in tries], of)) is not None
        told = _sureness(chosen, of, dtype)
        while is_changed and rest and told < WANTED_SURENESS and len(chosen) < MOST_PROBES:
            chosen.append(rest.pop())
            before, told = told, _sureness(chosen, of, dtype)
            if told <= before:  # it says less than the trainer's rounding
                chosen.pop()
                break
        are_told_apart.append(not is_changed or told >= WANTED_SURENESS)
    return [t.probe for t in chosen], all(are_told_apart)


def _rank(of_try: Try) -> tuple[bool, float]:
    return of_try.is_sure, _step(of_try, _policy) if of_try.is_sure else of_try.lead


def _sureness(tries: Sequence[Try], of: Callable[[Probe], _Both], dtype: str) -> float:
    return sureness(*_together([t.probe for t in tries], of), _ROUGHEST, dtype)


def _step(of_try: Try, of: Callable[[Probe], _Both]) -> float:
    return math.dist(*of(of_try.probe))


def _policy(probe: Probe) -> _Both:
    return probe.logprobs, probe.parent_logprobs


def _reward(probe: Probe) -> _Both:
    assert probe.parent_reward is not None, "it was computed"
    return (probe.reward,), (probe.parent_reward,)


def _together(probes: Sequence[Probe], of: Callable[[Probe], _Both]) -> _Both:
    child, parent = zip(*map(of, probes), strict=True)
    return tuple(chain(*child)), tuple(chain(*parent))


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


def _parents_numbers(trunk: Trunk, parent: Weights, pairs: Sequence[Pair]) -> Numbers:
    """Return the parent's numbers; the child is back in the trunk then."""
    own = {adapter: trunk.snapshot(adapter) for adapter in parent}
    try:
        for adapter, weights in parent.items():
            trunk.restore(adapter, weights)
        return numbers(trunk, pairs)
    finally:
        for adapter, weights in own.items():
            trunk.restore(adapter, weights)


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
    """Return the mean absolute difference, None where no number differs by more than rounding."""
    apart = [abs(a - b) for a, b in zip(child, parent, strict=True)]
    return sum(apart) / len(apart) if max(apart) > INDISTINCT else None
