"""python -m experiments.sized MODEL JOB: an update's work for a model of any size, made here.

Weights, prompts and responses are drawn at random: time and memory do not depend on what they say.
"""

import shutil
from pathlib import Path
from time import time
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils.logging import disable_progress_bar

from experiments.frozen import Job, Scored
from thumbloop.artifacts import (
    AdapterFacts,
    BaseModelIdentity,
    Lineage,
    Manifest,
    VerdictIdentity,
    write_version,
)
from thumbloop.config.trainer import Lora, Ppo, Resources
from thumbloop.rendering import VerdictTokens
from thumbloop.types import DEFAULT_POLICY
from trainer.measure import measure
from trainer.models import Trunk
from trainer.rollouts import Rollout

_PAD, _END = 0, 1
_VERDICT = VerdictTokens((2, 3), 4, 5, is_special=True)
_FIRST_WORD = 6
_HEAD = 64
"""Of a head of attention; Qwen2.5-0.5B's."""
_SHORTEST, _LONGEST = 32, 128
"""Prompts and responses, tokens."""


def config_of(*, hidden: int, layers: int, vocabulary: int) -> Qwen2Config:
    """Return a model's configuration, in the proportions of Qwen2.5-0.5B."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 38 // 7,
        num_hidden_layers=layers,
        num_attention_heads=hidden // _HEAD,
        num_key_value_heads=max(hidden // _HEAD // 7, 1),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=_PAD,
        bos_token_id=None,
        eos_token_id=_END,
    )


def write_untrained(trunk: Trunk, folder: Path, dtype: str) -> Path:
    """Write the trunk's adapters, which do nothing yet, as version 1; return the version's folder."""
    lora = trunk.lora
    adapter = AdapterFacts(
        digest="",
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=trunk.target_modules,
        distance=None,
    )

    def fill(into: Path) -> Manifest:
        trunk.save(into)
        return Manifest(
            policy=DEFAULT_POLICY,
            version=1,
            parent=0,
            created_at=time(),
            base_model=BaseModelIdentity(digest="", tokenizer_digest=""),
            verdict=VerdictIdentity(prompt=_VERDICT.prompt, up=_VERDICT.up, down=_VERDICT.down),
            dtype=dtype,
            policy_adapter=adapter,
            reward_adapter=adapter,
            lineage=Lineage(round_id="sized"),
        )

    return folder / write_version(folder, DEFAULT_POLICY, 1, fill).folder


def draw_rollouts(trunk: Trunk, prompts: int, candidates: int, seed: int) -> list[Scored]:
    """Return as many responses to each prompt, with the trunk's log-probabilities, and scores."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(trunk.causal.config.vocab_size)

    def tokens() -> tuple[int, ...]:
        length = int(torch.randint(_SHORTEST, _LONGEST + 1, (), generator=generator))
        ids = torch.randint(_FIRST_WORD, vocabulary, (length,), generator=generator)
        return tuple(ids.tolist())

    asked = [tokens() for _ in range(prompts)]
    pairs = [(prompt, tokens()) for prompt in asked for _ in range(candidates)]
    nothing = [
        Rollout("", 1, *pair, logprobs=(0.0,) * len(pair[1]), temperature=1.0) for pair in pairs
    ]
    found = measure(trunk, nothing).prox_logprobs.tolist()
    scores: list[float] = torch.randn(len(pairs), generator=generator).tolist()
    return [
        Scored(
            prompt=prompt,
            response=response,
            logprobs=tuple(logprobs[: len(response)]),
            temperature=1.0,
            has_eos=True,
            score=score,
        )
        for (prompt, response), logprobs, score in zip(pairs, found, scores, strict=True)
    ]


def main(
    model: Annotated[Path, typer.Argument(help="Folder to write the base model into.")],
    job: Annotated[Path, typer.Argument(help="The file to write.")],
    hidden: Annotated[int, typer.Option(min=_HEAD, help="Size of a hidden state.")] = 896,
    layers: Annotated[int, typer.Option(min=1)] = 24,
    vocabulary: Annotated[int, typer.Option(min=100)] = 151_936,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of the base model.")] = "bfloat16",
    prompts: Annotated[int, typer.Option(min=1)] = 64,
    candidates: Annotated[int, typer.Option(min=1, help="Of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a model, Qwen2.5's of 0.5 B parameters unless told otherwise, and a round's rollouts."""
    disable_progress_bar()
    torch.manual_seed(seed)
    shutil.rmtree(model, ignore_errors=True)
    config = config_of(hidden=hidden, layers=layers, vocabulary=vocabulary)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(model)
    lora, ppo = Lora(), Ppo()
    trunk = Trunk.open(model, lora, _VERDICT, Resources(device=device, dtype=dtype))
    work = Job(
        model=model.absolute(),
        version=write_untrained(trunk, model.absolute() / "versions", dtype),
        lora=lora,
        rollouts=tuple(draw_rollouts(trunk, prompts, candidates, seed)),
        epochs=ppo.epochs,
        minibatch=min(ppo.minibatch_size, prompts * candidates),
        learning_rate=ppo.learning_rate,
        threads=1,
        device=device,
        dtype=dtype,
    )
    work.write(job)


if __name__ == "__main__":
    typer.run(main)
