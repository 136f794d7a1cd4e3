"""Sequences of prompt and response as batches without padding, in which a shared prompt is there once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of a response."""


class Batch(NamedTuple):
    """B sequences of prompt and response as N tokens: of sequences with one prompt that is there once.

    S is the longest prompt plus response, T the longest response.
    """

    tokens: Tensor  # (N,)
    positions: Tensor  # (N,): of each token in its sequence
    rows: Tensor  # (B, S): which tokens a sequence is made of, any in the padding on the right
    places: Tensor  # (N,): where each token is in `rows` flattened, in one of its sequences
    states: Tensor  # (B, T + 1): tokens before each response token, and the last one
    responses: Tensor  # (B, T)
    mask: Tensor  # (B, T)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(x.to(device) for x in self))


def pad(rows: Sequence[Sequence[int]] | Sequence[Sequence[float]]) -> Tensor:
    """Stack rows of different lengths (B, longest), 0 in the padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def collate(pairs: Sequence[Pair]) -> Batch:
    """Build one batch from prompts and responses; no prompt may be empty."""
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    rows: list[list[int]] = []
    prompts: dict[tuple[int, ...], range] = {}

    def append(part: Sequence[int], *, row: int, first: int) -> range:
        at = range(len(tokens), len(tokens) + len(part))
        tokens.extend(part)
        positions.extend(range(first, first + len(part)))
        places.extend(range(row * width + first, row * width + first + len(part)))
        return at

    for row, (prompt, response) in enumerate(pairs):
        if prompt not in prompts:
            prompts[prompt] = append(prompt, row=row, first=0)
        own = append(response, row=row, first=len(prompt))
        rows.append([*prompts[prompt], *own])

    of_sequences = pad(rows)
    lengths = torch.tensor([len(response) for _, response in pairs])
    before_first = torch.tensor([len(prompt) - 1 for prompt, _ in pairs])
    steps = torch.arange(int(lengths.max()) + 1)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        rows=of_sequences,
        places=torch.tensor(places),
        states=of_sequences.gather(
            1, before_first[:, None] + torch.minimum(steps[None], lengths[:, None])
        ),
        responses=pad([response for _, response in pairs]),
        mask=steps[None, :-1] < lengths[:, None],
    )


def packed_size(pairs: Iterable[Pair]) -> int:
    """Return how many tokens one batch of these sequences has."""
    prompts, size = set[tuple[int, ...]](), 0
    for prompt, response in pairs:
        size += len(response) + (0 if prompt in prompts else len(prompt))
        prompts.add(prompt)
    return size


def micro_batches(
    pairs: Sequence[Pair], rows: Sequence[int], *, tokens: int, padded_tokens: int
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield some of the sequences in batches, or each alone where one is too long: which, and the batch.

    A batch has at most so many tokens, and at most so many where its sequences are padded. Those of one
    prompt come together, and long ones with long ones.
    """
    longest: dict[tuple[int, ...], int] = {}
    for row in rows:
        prompt, response = pairs[row]
        longest[prompt] = max(longest.get(prompt, 0), len(prompt) + len(response))

    def order(row: int) -> tuple[int, tuple[int, ...], int, int]:
        prompt, response = pairs[row]
        return -longest[prompt], prompt, -len(response), row

    group: list[int] = []
    size, width, prompts = 0, 0, set[tuple[int, ...]]()
    for row in sorted(rows, key=order):
        prompt, response = pairs[row]
        length = len(prompt) + len(response)
        more = len(response) if prompt in prompts else length
        is_full = size + more > tokens or (len(group) + 1) * max(width, length) > padded_tokens
        if group and is_full:
            yield torch.tensor(group), collate([pairs[i] for i in group])
            group, size, width, prompts = [], 0, 0, set()
            more = length
        group.append(row)
        prompts.add(prompt)
        size, width = size + more, max(width, length)
    if group:
        yield torch.tensor(group), collate([pairs[i] for i in group])
