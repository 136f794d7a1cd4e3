"""python -m loadtest.trl.step_1_12 JOB: an update by TRL 1.12's PPOTrainer, timed.

It samples and scores by itself: here it is handed the frozen responses with their logits, made
before the clock starts, and the frozen scores.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from loadtest.trl.frozen import Job, check_agreement, measure, open_policy, open_tokenizer, read

_get_reward = ppo_trainer.get_reward


class Scores(nn.Module):
    """Stands for a reward model: gives the next rows their scores, again and again."""

    def __init__(self, scores: Tensor, rows: int) -> None:
        super().__init__()
        self._parts = itertools.cycle(scores.split(rows))

    def next(self) -> Tensor:
        """Return the scores of the next rows."""
        scores: Tensor = next(self._parts)
        return scores


def get_reward(model: nn.Module, *arguments: Any) -> Any:
    """Do what TRL's own function does; of Scores, at no cost."""
    return (
        (None, model.next(), None) if isinstance(model, Scores) else _get_reward(model, *arguments)
    )


def value_model_of(job: Job) -> Any:
    """Return a frozen base model with a head that is trained: the cheapest that is offered."""
    dtype = getattr(torch, job.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=dtype)
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    return model


def trainer_of(job: Job, length: int, folder: str) -> Any:
    """Return the trainer; `length` is that of the longest response.

    With all rollouts in one batch of the device every minibatch is an optimizer step.
    """
    return PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            use_cpu=job.device == "cpu",
            bf16=job.dtype == "bfloat16",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
            per_device_train_batch_size=len(job.rollouts),
            gradient_accumulation_steps=1,
            num_mini_batches=len(job.rollouts) // job.minibatch,
            num_ppo_epochs=job.epochs,
            total_episodes=len(job.rollouts),
            local_rollout_forward_batch_size=job.minibatch,
            response_length=length,
            temperature=1.0,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
        ),
        processing_class=open_tokenizer(job.model),
        model=open_policy(job),
        ref_model=None,
        reward_model=Scores(
            torch.stack([r.score for r in job.rollouts]).to(job.device), job.minibatch
        ),
        value_model=value_model_of(job),
        train_dataset=[{"input_ids": rollout.prompt} for rollout in job.rollouts],
    )


@torch.no_grad()
def logits_of(policy: nn.Module, rows: Tensor, pad: int, context: int, size: int) -> Tensor:
    """Return the logits (B, T, V) that the responses were drawn from, computed as TRL does."""
    parts = (ppo_trainer.forward(policy, part, pad).logits for part in rows.split(size))
    # Copies: a slice would keep the logits of the prompts, too.
    return torch.cat([part[:, context - 1 : -1].clone() for part in parts])


def logprobs_of(logits: Tensor, responses: Tensor, size: int) -> Tensor:
    """Return the log-probabilities (B, T) of responses (B, T) by their logits (B, T, V)."""
    parts = zip(logits.split(size), responses[..., None].split(size), strict=True)
    drawn = [part.float().log_softmax(-1).gather(2, ids).squeeze(2) for part, ids in parts]
    return torch.cat(drawn)


def stack(rows: Sequence[Tensor], pad: int, *, is_left: bool) -> Tensor:
    """Stack rows of different lengths (B, longest), padded on one side."""
    longest = max(map(len, rows))
    padded = [torch.full((longest - len(row),), pad) for row in rows]
    pairs = zip(padded, rows, strict=True)
    return torch.stack([torch.cat([p, row] if is_left else [row, p]) for p, row in pairs])


def main() -> None:
    """Measure the job that the command line names."""
    job = read(Path(sys.argv[1]))
    pad = open_tokenizer(job.model).pad_token_id
    queries = stack([rollout.prompt for rollout in job.rollouts], pad, is_left=True)
    responses = stack([rollout.response for rollout in job.rollouts], pad, is_left=False)
    queries, responses = queries.to(job.device), responses.to(job.device)
    whole = torch.cat([queries, responses], dim=1)
    with TemporaryDirectory() as folder:
        trainer = trainer_of(job, responses.shape[1], folder)
        context, policy = queries.shape[1], trainer.model.policy
        logits = logits_of(policy, whole, pad, context, job.minibatch)
        drawn = logprobs_of(logits, responses, job.minibatch)
        lengths = [len(rollout.response) for rollout in job.rollouts]
        check_agreement(job, [row[:n] for row, n in zip(drawn, lengths, strict=True)])
        trainer.dataloader = [{"input_ids": queries}]
        ppo_trainer.batch_generation = lambda *_: (whole, logits)
        ppo_trainer.get_reward = get_reward
        measure(job, trainer.model, trainer.optimizer.optimizer, trainer.train)


if __name__ == "__main__":
    main()
