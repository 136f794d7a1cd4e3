"""A task's reward model, asked without our packages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loadtest.trl.frozen import open_model

AT_ONCE = 128
_TOLERANCE = 1e-2
"""How far rewards may be from the task's, logits."""

Task = dict[str, Any]
"""What experiments.episodes.Task holds."""


class RewardModel:
    """The task's reward model: the base model with a version's reward adapter, asked for a verdict."""

    def __init__(self, task: Task) -> None:
        adapter = Path(task["adapters"]) / "reward"
        self._model = open_model(
            task["model"], task["lora"]["rank"], task["lora"]["alpha"], adapter
        )
        self._model.eval()
        self._verdict = task["verdict"]

    @torch.no_grad()
    def __call__(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
        """Return the reward of each response, logits."""
        question = torch.tensor(self._verdict["prompt"])
        rows = [
            torch.cat(parts)
            for parts in zip(queries, responses, [question] * len(queries), strict=True)
        ]
        return [
            reward
            for i in range(0, len(rows), AT_ONCE)
            for reward in self._of(rows[i : i + AT_ONCE])
        ]

    def check(self, known: Sequence[Mapping[str, Any]]) -> None:
        """Make sure that it gives responses the rewards that are known of them."""
        ours = self(
            *([torch.tensor(each[name]) for each in known] for name in ("prompt", "response"))
        )
        apart = max(abs(float(own) - each["reward"]) for own, each in zip(ours, known, strict=True))
        if not apart <= _TOLERANCE:
            raise SystemExit(f"error: rewards are {apart:.2g} logits from those of the task")

    def _of(self, rows: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        tokens = pad_sequence(list(rows), batch_first=True)
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        logits = self._model(input_ids=tokens, attention_mask=mask.long()).logits
        last = logits[torch.arange(len(rows)), lengths - 1]
        rewards: Tensor = last[:, self._verdict["up"]] - last[:, self._verdict["down"]]
        return rewards
