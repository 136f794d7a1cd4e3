"""Pre-training of the demo's base model: conversations in packed rows -> a language model.

Loss falls on replies and verdicts only. It knows nothing of the corpus but its token ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

NO_LOSS = -100
"""Label of a token that is read but not learned."""
OPEN_ROWS = 64
"""Rows that packing keeps open at a time; more of them waste less padding and cost more search."""


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of the optimizer and the shape of a step."""

    rows_per_step: int = 8
    row_tokens: int = 256
    learning_rate: float = 3e-3
    muon_learning_rate: float = 8e-3
    muon_steps: int = 4
    """Newton-Schulz iterations; the fifth buys nothing at this size."""
    warmup_share: float = 0.05
    max_grad_norm: float = 1.0


class Progress(NamedTuple):
    """How far pre-training has come."""

    step: int
    steps: int
    loss: float


class Example(NamedTuple):
    """One conversation: token ids, and labels that hide what is not learned."""

    ids: list[int]
    labels: list[int]


class Rows(NamedTuple):
    """Packed conversations, each (R, T): positions start at 0 again with each conversation."""

    ids: Tensor
    labels: Tensor
    positions: Tensor


def pack(examples: Sequence[Example], row_tokens: int, pad: int) -> Rows:
    """Lay whole conversations side by side in rows, first fit; padding fills what is left."""
    rows: list[list[Example]] = []
    space: list[int] = []
    for example in examples:
        size = len(example.ids)
        first_open = max(0, len(rows) - OPEN_ROWS)
        row = next((i for i in range(first_open, len(rows)) if space[i] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(row_tokens)
        rows[row].append(example)
        space[row] -= size
    padded = [
        [*row, Example([pad] * left, [NO_LOSS] * left)]
        for row, left in zip(rows, space, strict=True)
    ]
    return Rows(
        torch.tensor([[token for example in row for token in example.ids] for row in padded]),
        torch.tensor([[label for example in row for label in example.labels] for row in padded]),
        torch.tensor([[i for example in row for i in range(len(example.ids))] for row in padded]),
    )


def pretrain(
    model: LlamaForCausalLM,
    rows: Rows,
    training: Training,
    *,
    generator: torch.Generator,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Train the model in place, one pass over the rows in random order."""
    batches = _batches(len(rows.ids), training.rows_per_step, generator)
    optimizers = _optimizers(model, training)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _learning_rate_factor(step, len(batches), training.warmup_share)
        )
        for optimizer in optimizers
    ]
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss = _loss(model, Rows(*(field[batch] for field in rows)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if on_progress:
            on_progress(Progress(step, len(batches), loss.item()))
    model.eval()


def _batches(rows: int, rows_per_step: int, generator: torch.Generator) -> list[Tensor]:
    """Row indices of each step, every row once."""
    order = torch.randperm(rows, generator=generator)
    return [order[start : start + rows_per_step] for start in range(0, rows, rows_per_step)]


def _loss(model: LlamaForCausalLM, rows: Rows) -> Tensor:
    """Mean cross-entropy over labelled tokens. Positions that restart keep conversations apart."""
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
        hidden = model.model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False)[0]
        learned = rows.labels[:, 1:] != NO_LOSS
        logits = model.lm_head(hidden[:, :-1][learned])
    return torch.nn.functional.cross_entropy(logits.float(), rows.labels[:, 1:][learned])


def _has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware: twice as fast, and as good here."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def _optimizers(model: LlamaForCausalLM, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head (Jordan et al. 2024), AdamW for the rest.

    Copying a subject from the prompt takes AdamW alone half of the run to discover.
    """
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            hidden,
            lr=training.muon_learning_rate,
            weight_decay=0.0,
            ns_steps=training.muon_steps,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def _learning_rate_factor(step: int, steps: int, warmup_share: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
