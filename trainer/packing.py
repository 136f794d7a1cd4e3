"""Attention over batches without padding: every token is computed once, also where sequences share it.

The rest of a transformer treats tokens one by one, and need not know where a sequence begins.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.batches import Batch

ATTENTION = "thumbloop_packed"
"""The name under which transformers know `attend`."""
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Four dimensions: transformers take it for a mask that is ready, and make none of N x N."""


class Layout(NamedTuple):
    """Where the tokens of a packed batch belong; see Batch."""

    rows: Tensor  # (B, S)
    places: Tensor  # (N,)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in each sequence of a layout: query, key and value (1, heads, N, D) -> (1, N, heads, D).

    Without a layout it is PyTorch's own attention, as transformers call it.
    """
    if layout is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None

    def unpack(x: Tensor) -> Tensor:
        return x[0].transpose(0, 1)[layout.rows].transpose(1, 2)  # (B, heads, S, D)

    mask = None if sliding_window is None else _window(layout.rows, sliding_window)
    out, _ = sdpa_attention_forward(module, *map(unpack, (query, key, value)), mask, **kwargs)
    return out.flatten(0, 1)[layout.places][None], None


def _window(rows: Tensor, width: int) -> Tensor | None:
    """Return which states each sees (1, 1, S, S), None where all that came before it."""
    length = rows.shape[1]
    if length <= width:
        return None
    steps = torch.arange(length, device=rows.device)
    back = steps[:, None] - steps[None]
    return ((back >= 0) & (back < width))[None, None]


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packed_states(model: Any, batch: Batch) -> Tensor:
    """Return a base model's last hidden states (N, H) of a batch's tokens; it has to attend by `attend`."""
    states: Tensor = model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        attention_mask=_NO_MASK.to(batch.tokens.device),
        layout=Layout(batch.rows, batch.places),
        use_cache=False,
    )[0]
    return states[0]


def padded_states(model: Any, batch: Batch) -> Tensor:
    """Return the same from one row a sequence, for models that are more than attention between tokens."""
    states: Tensor = model(input_ids=batch.tokens[batch.rows], use_cache=False)[0]
    return states.flatten(0, 1)[batch.places]


def checkpoint_layers(model: nn.Module) -> None:
    """Let a model's layers compute their activations again for the gradient, instead of keeping them.

    transformers' own does so in training mode only, which would turn dropout on.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
