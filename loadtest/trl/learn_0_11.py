"""python -m loadtest.trl.learn_0_11 TASK: TRL 0.11.4's PPOTrainer learns a task; prints a line of JSON."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from demo.judging import Judged, columns, judge
from loadtest.trl.frozen import open_model, open_tokenizer
from loadtest.trl.rewards import AT_ONCE, RewardModel, Task


def trainer_of(task: Task) -> Any:
    """Return the trainer on an untrained adapter; what the task does not say is TRL's default."""
    model = open_model(task["model"], task["lora"]["rank"], task["lora"]["alpha"])
    return PPOTrainer(
        config=PPOConfig(
            batch_size=task["candidates"] * len(task["updates"][0]),
            mini_batch_size=task["minibatch"],
            gradient_accumulation_steps=1,
            ppo_epochs=task["epochs"],
            learning_rate=task["learning_rate"],
            seed=task["seed"],
        ),
        model=AutoModelForCausalLMWithValueHead.from_pretrained(model),
        tokenizer=open_tokenizer(task["model"]),
    )


def sample(trainer: Any, prompts: Sequence[Sequence[int]], most: int) -> list[Tensor]:
    """Return a response of the policy to each prompt, its end included."""
    tokenizer = trainer.tokenizer
    responses: list[Tensor] = trainer.generate(
        [torch.tensor(prompt) for prompt in prompts],
        batch_size=AT_ONCE,
        return_prompt=False,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return responses


def main() -> None:
    """Learn until the policy is good enough, or has seen enough; say what it is worth after each update."""
    task: Task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(task["seed"])
    trainer, rewards = trainer_of(task), RewardModel(task)
    rewards.check(task["known"])
    words = Tokenizer.from_file(str(Path(task["model"]) / "tokenizer.json"))
    asked = [each["text"] for each in task["held_out"]]
    held_out = [each["tokens"] for each in task["held_out"]]

    def examine() -> Judged:
        replies = sample(trainer, held_out, task["max_tokens"])
        texts = [words.decode(reply.tolist(), skip_special_tokens=True) for reply in replies]
        return judge(task["preference"], asked, texts)

    episodes, judged = [0], [examine()]
    for update in task["updates"]:
        if judged[-1].both >= task["goal"]:
            break
        prompts = [prompt for prompt in update for _ in range(task["candidates"])]
        responses = sample(trainer, prompts, task["max_tokens"])
        queries = [torch.tensor(prompt) for prompt in prompts]
        trainer.step(queries, responses, rewards(queries, responses))
        if not all(bool(p.isfinite().all()) for p in trainer.model.parameters()):
            break  # broken down: nothing can be sampled from it
        episodes.append(episodes[-1] + len(prompts))
        judged.append(examine())
    print(json.dumps({"episodes": episodes, **columns(judged)}))


if __name__ == "__main__":
    main()
