"""python -m experiments.tasks MODEL FOLDER: what policies are to learn, with one reward model, as a file for each seed.

The reward model is fitted on replies of the base model and stays as it is while policies learn from it.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo.corpus import held_out_prompts, train_prompts
from demo.preferences import load_preference
from experiments.episodes import Question, Task
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
MAX_TOKENS = 64


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    folder: Annotated[Path, typer.Argument(help="For <seed>.json and the adapters; to be empty.")],
    preference: Annotated[str, typer.Option(help="Whose thumbs, none of them a slip.")] = "praise",
    thumbs: Annotated[
        int, typer.Option(min=1, help="Replies rated, each to another prompt.")
    ] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Tasks, with seeds from 0.")] = 3,
    updates: Annotated[int, typer.Option(min=1, help="After which a policy is given up.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="Of each update.")] = 64,
    candidates: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
) -> None:
    """Fit a reward model and write tasks; say how well it orders replies to held-out prompts."""
    disable_progress_bar()
    config = TrainerConfig()
    torch.set_num_threads(config.resources.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    verdict = verdict_tokens(config.verdict, tokenizer)
    trunk = Trunk.open(model, config.lora, verdict, Resources(device="cpu"))
    prefers = load_preference(preference)
    end = end_tokens(model, trunk, tokenizer)

    def questions(texts: list[str]) -> tuple[Question, ...]:
        asked = [Prompt(messages=(Message(Role.USER, text),)) for text in texts]
        return tuple(
            Question(text=text, tokens=render(prompt, tokenizer))
            for text, prompt in zip(texts, asked, strict=True)
        )

    def rate(asked: tuple[Question, ...]) -> list[Thumb]:
        tokens = [each.tokens for each in asked]
        replies = sample(trunk, tokens, end=end, max_tokens=MAX_TOKENS, seed=0)
        return [
            Thumb(
                feedback_id=i,
                response_id=str(i),
                user=str(i),
                is_up=prefers(each.text, text_of(reply.token_ids, tokenizer)) >= 0.5,
                prompt=each.tokens,
                response=reply.token_ids,
            )
            for i, (each, reply) in enumerate(zip(asked, replies, strict=True))
        ]

    rated = rate(questions(train_prompts(thumbs, 0)))
    reward.fit(trunk, rated, config.reward, torch.Generator().manual_seed(0))
    trial = reward.try_on(trunk, rate(questions(held_out_prompts(HELD_OUT, 0))))
    adapters = folder.absolute() / "adapters"
    adapters.mkdir(parents=True)
    trunk.save(adapters)
    for seed in range(seeds):
        asked = [each.tokens for each in questions(train_prompts(updates * prompts, seed))]
        task = Task(
            model=model.absolute(),
            adapters=adapters,
            lora=config.lora,
            verdict=verdict,
            preference=preference,
            updates=tuple(tuple(asked[i : i + prompts]) for i in range(0, len(asked), prompts)),
            candidates=candidates,
            held_out=questions(held_out_prompts(HELD_OUT, seed)),
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
