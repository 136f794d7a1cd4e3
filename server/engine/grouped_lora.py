"""LoRA for vLLM on a CPU: one pair of matrix products per module, whatever the batch mixes.

vLLM's own CPU operators gather an adapter's weights once per token, and give rows without an adapter
another row's. Here the adapters of a batch stand side by side in one matrix, and a mask keeps each
row to its own: y += ((x A^T) * mask) B^T. Masks are made once per batch, matrices once per set of
adapters. Only linear layers may be wrapped; the engine sees to that (`lora_target_modules`).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from server.engine.products import Product, product

MANY_ROWS = 64
"""A mixed batch of more rows than this is split by adapter instead of masked."""
FEW_ROWS = 8
"""Up to so many rows, slices share one block-diagonal product: a call costs more than its zeros."""

MANY_SETS = 8
"""Sets of slots that a layer keeps packed; the one met longest ago makes room."""

Slots = tuple[int, ...]
Rows = slice | Tensor  # of a batch: a run of them, or their indices (R,)
Stacked = tuple[
    Tensor, ...
]  # per slice of a packed layer: (slots, 1, rank, I) or (slots, 1, O, rank)


class Group(NamedTuple):
    """The rows of a batch that use one adapter, and its slot."""

    slot: int
    rows: Rows


@dataclass(slots=True)
class Plan:
    """Which rows of a batch use which slot, `rest`: none. `is_uniform`: all use the same one."""

    size: int
    groups: tuple[Group, ...]
    rest: Rows | None
    _masks: dict[tuple[Slots, int, int], Tensor] = field(default_factory=dict)

    @property
    def is_uniform(self) -> bool:
        """Say whether one adapter has all rows."""
        return len(self.groups) == 1 and self.rest is None

    @property
    def slots(self) -> Slots:
        """Return the slots in use, ascending."""
        return tuple(group.slot for group in self.groups)

    def mask(self, slots: Slots, rank: int, slices: int, dtype: torch.dtype) -> Tensor:
        """Return 1 where a row may use a column: (size, slices * len(slots) * rank), in that order."""
        key = (slots, rank, slices)
        if key not in self._masks:
            own = torch.zeros(self.size, len(slots), dtype=dtype)
            for group in self.groups:
                if group.slot in slots:
                    own[group.rows, slots.index(group.slot)] = 1
            self._masks[key] = own.repeat_interleave(rank, dim=1).repeat(1, slices)
        return self._masks[key]


def make_plan(adapters: Sequence[int], adapter_in: Sequence[int | None]) -> Plan | None:
    """Plan a batch from each row's adapter number, 0 for none; None when no row has one.

    `adapter_in[slot]` is the number of the adapter that the slot holds.
    """
    of_rows = np.asarray(adapters)
    present = [int(number) for number in np.unique(of_rows) if number > 0]
    if not present:
        return None
    slots = sorted((adapter_in.index(number), number) for number in present)
    groups = tuple(Group(slot, _rows(of_rows == number)) for slot, number in slots)
    is_rest = of_rows <= 0
    return Plan(len(of_rows), groups, _rows(is_rest) if is_rest.any() else None)


def _rows(chosen: NDArray[np.bool_]) -> Rows:
    """Return the rows chosen, at least one; a run of them costs no copies."""
    rows = np.flatnonzero(chosen)
    first, end = int(rows[0]), int(rows[-1]) + 1
    return slice(first, end) if end - first == len(rows) else torch.from_numpy(rows)


class Slice(NamedTuple):
    """A slice's part of the expansion: its columns in the shrunk rows, and in the output."""

    shrunk: slice
    output: slice
    b: Product


class Piece(NamedTuple):
    """One adapter's part of a module, out of vLLM's slot. `rank`: ranks in use; 0: it changes nothing.

    Per slice: a (rank of the slot, I), b (O, rank of the slot).
    """

    rank: int
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]

    @classmethod
    def of(cls, a: Stacked, b: Stacked, slot: int) -> "Piece":
        """Copy a slot."""
        ours = (
            tuple(part[slot, 0].clone() for part in a),
            tuple(part[slot, 0].clone() for part in b),
        )
        if not any(part.any() for part in ours[1]):
            return cls(0, *ours)
        in_use = torch.stack([part.any(dim=1) for part in ours[0]]).any(dim=0).nonzero()
        return cls(int(in_use.max()) + 1 if len(in_use) else 0, *ours)


class Packed:
    """The adapters of some slots side by side, for one module; those that change nothing left out.

    Columns are ordered by slice, then slot, then rank, of which the highest in use are all there are.
    """

    def __init__(self, pieces: Mapping[int, Piece]) -> None:
        self.slots: Slots = tuple(pieces)
        self.rank = max(piece.rank for piece in pieces.values())
        slices = range(len(next(iter(pieces.values())).a))
        of_slots = pieces.values()
        self.a = product(torch.cat([p.a[i][: self.rank] for i in slices for p in of_slots]))
        self._b = [torch.cat([p.b[i][:, : self.rank] for p in of_slots], dim=1) for i in slices]

    @cached_property
    def _slices(self) -> list[Slice]:
        width, offset, slices = len(self.slots) * self.rank, 0, []
        for i, matrix in enumerate(self._b):
            outputs = slice(offset, offset + len(matrix))
            slices.append(Slice(slice(i * width, (i + 1) * width), outputs, product(matrix)))
            offset = outputs.stop
        return slices

    @cached_property
    def _block_diagonal(self) -> Product:
        return self._slices[0].b if len(self._b) == 1 else product(torch.block_diag(*self._b))

    def shrink(self, x: Tensor, plan: Plan) -> Tensor:
        """Return ((x A^T) * mask), shape (R, slices * slots * rank)."""
        shrunk = self.a.of(x)
        if not plan.is_uniform:
            shrunk.mul_(plan.mask(self.slots, self.rank, len(self._b), shrunk.dtype))
        return shrunk

    def expand(self, y: Tensor, shrunk: Tensor) -> None:
        """Add the shrunk rows times B^T to y (R, O)."""
        if len(y) <= FEW_ROWS:
            self._block_diagonal.add_to(y, shrunk)
            return
        for part in self._slices:
            part.b.add_to(y[:, part.output], shrunk[:, part.shrunk])


class Module:
    """A wrapped layer's adapters as vLLM keeps them, and packed for the sets of slots met so far."""

    def __init__(self, a: Stacked, b: Stacked) -> None:
        self._a = a
        self._b = b
        self._pieces: dict[int, Piece] = {}
        self._packed: dict[Slots, Packed | None] = {}

    def packed(self, slots: Slots) -> Packed | None:
        """Return the slots' adapters side by side; None when none of them changes anything."""
        if slots not in self._packed:
            if len(self._packed) >= MANY_SETS:
                del self._packed[next(iter(self._packed))]
            pieces = {slot: piece for slot in slots if (piece := self.piece(slot)).rank}
            self._packed[slots] = Packed(pieces) if pieces else None
        return self._packed[slots]

    def piece(self, slot: int) -> Piece:
        """Return the adapter that a slot holds."""
        if slot not in self._pieces:
            self._pieces[slot] = Piece.of(self._a, self._b, slot)
        return self._pieces[slot]

    def forget(self, changed: Set[int]) -> None:
        """Forget the slots that hold another adapter now."""
        for slot in changed:
            self._pieces.pop(slot, None)
        stale = [slots for slots in self._packed if not changed.isdisjoint(slots)]
        for slots in stale:
            del self._packed[slots]


class GroupedLora(PunicaWrapperCPU):  # type: ignore[misc]
    """Takes the place of vLLM's own operators; `server.engine.worker` puts it there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan: Plan | None = None
        self.is_merged = False
        self._modules: dict[int, Module] = {}
        self._held: list[int | None] = []

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Plan a new batch; vLLM calls this when rows or slots have changed since the last.

        A slot that holds the same adapter still is taken to be unchanged: no number is used twice, and
        vLLM writes to a slot only when it gives it to an adapter.
        """
        self.plan = make_plan(mapping.index_mapping, lora_index_to_id)
        held = zip_longest(self._held, lora_index_to_id)
        if changed := {slot for slot, (before, now) in enumerate(held) if before != now}:
            self._held = list(lora_index_to_id)
            for module in self._modules.values():
                module.forget(changed)

    def module(self, a: Stacked, b: Stacked) -> Module:
        """Return what is kept of the layer whose adapters vLLM stacks in these."""
        if id(a) not in self._modules:
            self._modules[id(a)] = Module(a, b)
        return self._modules[id(a)]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Stacked,
        lora_b_stacked: Stacked,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add each row's adapter to the layer's output y (R, O), given its input x (R, I)."""
        plan = self.plan
        if plan is None or self.is_merged:
            return
        module = self.module(lora_a_stacked, lora_b_stacked)
        if plan.is_uniform or plan.size <= MANY_ROWS:
            if packed := module.packed(plan.slots):
                packed.expand(y, packed.shrink(x, plan))
            return
        for group in plan.groups:
            if packed := module.packed((group.slot,)):
                part = y[group.rows]
                packed.expand(part, packed.a.of(x[group.rows]))
                if not isinstance(group.rows, slice):  # a copy
                    y[group.rows] = part

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the head is not wrapped, and no adapter of ours has a part for it."""
        raise AssertionError("grouped LoRA wraps linear layers only, not the head")

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: embeddings are not wrapped, and no adapter of ours has a part for them."""
        raise AssertionError("grouped LoRA wraps linear layers only, not embeddings")
