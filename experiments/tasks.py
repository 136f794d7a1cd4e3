"""python -m experiments.tasks MODEL FOLDER: what policies are to learn, with one reward model, as a file for each seed.

The reward model is fitted on replies of the base model and stays as it is while policies learn from it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo.corpus import held_out_prompts, train_prompts
from demo.preferences import load_preference
from experiments.episodes import Known, Question, Task
from experiments.frozen import MAX_TOKENS
from experiments.sampling import sample
from thumbloop.config import TrainerConfig
from thumbloop.config.trainer import Resources
from thumbloop.rendering import render, text_of, verdict_tokens
from thumbloop.types import Message, Prompt, Role
from trainer import reward
from trainer.assembly import end_tokens
from trainer.models import Trunk
from trainer.rollouts import Thumb

GOAL = 0.85
HELD_OUT = 300
KNOWN = 16
"""Responses whose rewards are told."""


class Raters:
    """Users who ask the base model, and rate what it says without a slip."""

    def __init__(self, trunk: Trunk, tokenizer: Any, end: Sequence[int], preference: str) -> None:
        self._trunk = trunk
        self._tokenizer = tokenizer
        self._end = end
        self._prefers = load_preference(preference)

    def ask(self, texts: Sequence[str]) -> tuple[Question, ...]:
        """Return prompts with their token ids."""
        asked = [Prompt(messages=(Message(Role.USER, text),)) for text in texts]
        tokens = [render(prompt, self._tokenizer) for prompt in asked]
        return tuple(Question(text=t, tokens=ids) for t, ids in zip(texts, tokens, strict=True))

    def rate(self, texts: Sequence[str]) -> list[Thumb]:
        """Return thumbs on one reply of the base model to each prompt."""
        asked = self.ask(texts)
        tokens = [each.tokens for each in asked]
        replies = sample(self._trunk, tokens, end=self._end, max_tokens=MAX_TOKENS, seed=0)
        return [
            Thumb(
                feedback_id=i,
                response_id=str(i),
                user=str(i),
                is_up=self._prefers(each.text, text_of(reply.token_ids, self._tokenizer)) >= 0.5,
                prompt=each.tokens,
                response=reply.token_ids,
            )
            for i, (each, reply) in enumerate(zip(asked, replies, strict=True))
        ]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    folder: Annotated[Path, typer.Argument(help="For <seed>.json and the adapters; to be empty.")],
    preference: Annotated[str, typer.Option(help="Whose thumbs, none of them a slip.")] = "praise",
    thumbs: Annotated[
        int, typer.Option(min=1, help="Replies rated, each to another prompt.")
    ] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Tasks, with seeds from 0.")] = 3,
    updates: Annotated[int, typer.Option(min=1, help="After which a policy is given up.")] = 6,
    prompts: Annotated[int, typer.Option(min=1, help="Of each update.")] = 64,
    candidates: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
) -> None:
    """Fit a reward model and write tasks; say how well it orders replies to held-out prompts."""
    disable_progress_bar()
    config = TrainerConfig()
    torch.set_num_threads(config.resources.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    trunk = Trunk.open(
        model, config.lora, verdict_tokens(config.verdict, tokenizer), Resources(device="cpu")
    )
    raters = Raters(trunk, tokenizer, end_tokens(model, trunk, tokenizer), preference)
    rated = raters.rate(train_prompts(thumbs, seeds))  # a seed that no task has
    reward.fit(trunk, rated, config.reward, torch.Generator().manual_seed(0))
    unseen = raters.rate(held_out_prompts(HELD_OUT, seeds))
    trial = reward.try_on(trunk, unseen)
    adapters = folder.absolute() / "adapters"
    adapters.mkdir(parents=True)
    trunk.save(adapters)
    known = tuple(
        Known(prompt=thumb.prompt, response=thumb.response, reward=worth)
        for thumb, worth in list(zip(trial.thumbs, trial.rewards, strict=True))[:KNOWN]
    )
    for seed in range(seeds):
        asked = [each.tokens for each in raters.ask(train_prompts(updates * prompts, seed))]
        task = Task(
            model=model.absolute(),
            adapters=adapters,
            lora=config.lora,
            verdict=trunk.verdict,
            preference=preference,
            updates=tuple(tuple(asked[i : i + prompts]) for i in range(0, len(asked), prompts)),
            candidates=candidates,
            held_out=raters.ask(held_out_prompts(HELD_OUT, seed)),
            known=known,
            goal=GOAL,
            max_tokens=MAX_TOKENS,
            epochs=config.ppo.epochs,
            minibatch=config.ppo.minibatch_size,
            learning_rate=config.ppo.learning_rate,
            threads=config.resources.threads,
            seed=seed,
        )
        (folder / f"{seed}.json").write_text(task.model_dump_json())
    print(json.dumps({"auroc": trial.evidence.auroc}))


if __name__ == "__main__":
    typer.run(main)
