"""python -m loadtest.trl.step_0_11 JOB [PARTS]: an update by TRL 0.11.4's PPOTrainer, timed.

With more than one part, gradients are added up over so many passes a minibatch: that takes less memory.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from loadtest.trl.frozen import Job, check_agreement, measure, open_policy, open_tokenizer, read


def trainer_of(job: Job, parts: int) -> Any:
    """Return the trainer as its documentation builds it, with nothing that shortens an update."""
    return PPOTrainer(
        config=PPOConfig(
            batch_size=len(job.rollouts),
            mini_batch_size=job.minibatch // parts,
            gradient_accumulation_steps=parts,
            ppo_epochs=job.epochs,
            learning_rate=job.learning_rate,
            early_stopping=False,
            adap_kl_ctrl=False,
            ratio_threshold=math.inf,
        ),
        model=AutoModelForCausalLMWithValueHead.from_pretrained(open_policy(job)),
        tokenizer=open_tokenizer(job.model),
    )


@torch.no_grad()
def logprobs(trainer: Any, queries: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Return the log-probabilities of each response, as the trainer itself computes them."""
    inputs = trainer.prepare_model_inputs(queries, responses)
    of_all, _, _, masks = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    return [row[mask.bool()] for row, mask in zip(of_all, masks, strict=True)]


def main() -> None:
    """Measure the job that the command line names."""
    job = read(Path(sys.argv[1]))
    trainer = trainer_of(job, parts=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    queries = [rollout.prompt for rollout in job.rollouts]
    responses = [rollout.response for rollout in job.rollouts]
    check_agreement(job, logprobs(trainer, queries, responses))
    scores = [rollout.score for rollout in job.rollouts]
    update = partial(trainer.step, queries, responses, scores)
    measure(job, trainer.model, trainer.optimizer.optimizer, update)


if __name__ == "__main__":
    main()
