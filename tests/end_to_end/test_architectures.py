"""Every architecture we name: what the trainer writes, vLLM serves with the same numbers; and the loop
closes: users rate, the trainer's process learns and publishes, the server proves and swaps.

Tiny random models. The reference is plain transformers and PEFT, which load the folders that the trainer
saved; the trainer has to agree with them as well.
"""

import asyncio
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
import pytest_asyncio
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.publishing import RealSpeaker
from tests.serving import Running, running
from tests.tiny_model import build_tokenizer
from thumbloop.config import State, Verdict
from thumbloop.config.trainer import Lora, Resources
from thumbloop.rendering import verdict_tokens
from thumbloop.types import Sampling
from trainer.models import ADAPTERS, Trunk
from trainer.probes import numbers

pytestmark = pytest.mark.asyncio(loop_scope="module")

MERGED_GIB = {"gpt2": 0.0, "llama": 0.5, "opt": 0.0, "qwen2": 0.0, "qwen3": 0.5}
"""Architectures, and the room for merged adapters: without any they are grouped, as for larger models."""
PROMPTS = [tuple(8 + (11 * i + 5 * n) % 280 for i in range(n)) for n in (3, 17, 33, 70)]
EQUAL = {"abs": 1e-4}
ROOT = Path(__file__).parents[2]


def config_of(name: str, vocabulary: int) -> PreTrainedConfig:
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    llama_like = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        **ends,
    }
    match name:
        case "gpt2":
            return GPT2Config(
                vocab_size=vocabulary,
                n_positions=256,
                n_embd=64,
                n_layer=2,
                n_head=2,
                initializer_range=0.2,
                **ends,
            )
        case "opt":
            return OPTConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                word_embed_proj_dim=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=256,
                init_std=0.2,
                **ends,
            )
        case "llama":
            return LlamaConfig(**llama_like)
        case "qwen2":
            return Qwen2Config(**llama_like)
        case "qwen3":
            return Qwen3Config(**llama_like, head_dim=32)
    raise AssertionError(name)


def build(folder: Path, name: str) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, len(tokenizer)))
    model.to(torch.float32).save_pretrained(folder)
    return folder


def trained(folder: Path) -> Trunk:
    """Return a trunk whose adapters have something to say."""
    verdict = verdict_tokens(Verdict(), build_tokenizer())
    lora = Lora(rank=4, alpha=8.0)
    trunk = Trunk.open(folder, lora, verdict, Resources(device="cpu"))
    with torch.no_grad():
        for adapter in ADAPTERS:
            for name, parameter in trunk.parameters(adapter).items():
                if ".lora_B." in name:
                    parameter.normal_(std=0.2)
    return trunk


class Serving(NamedTuple):
    """A server of one architecture, and where its model and state are."""

    server: Running
    model: Path
    state: State


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MERGED_GIB)
async def serving(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp(request.param)
    model, state = build(folder / "model", request.param), State(folder=folder / "state")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what vllm's imports and its start have to say of torch
        from server.__main__ import make_engine

        settings = {
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 8,
            "kv_cache_gib": 0.1,
            "max_rank": 4,
            "merged_gib": MERGED_GIB[request.param],
        }
        async with running(model, state, make_engine=make_engine, engine=settings) as server:
            yield Serving(server, model, state)


@pytest.mark.timeout(180)
async def test_the_engine_says_what_peft_and_the_trainer_say(serving: Serving, tmp_path: Path):
    engine, model = serving.server.engine, serving.model
    trunk = trained(model)
    trunk.save(tmp_path)
    loaded = [await engine.load(adapter, tmp_path / adapter) for adapter in ADAPTERS]
    zero = await engine.load_zero("zero")
    policy, reward = loaded
    assert len(engine.lora_shapes) == len(trunk.parameters("policy")) // 2
    samples = await asyncio.gather(
        *(engine.sample(p, Sampling(8, seed=1), policy) for p in PROMPTS),
        *(engine.sample(p, Sampling(8, seed=1), zero) for p in PROMPTS),
    )
    pairs = [(p, s.token_ids) for p, s in zip(PROMPTS * 2, samples, strict=True)]
    verdict, of_policy = trunk.verdict, pairs[: len(PROMPTS)]
    answers = await asyncio.gather(
        *(
            engine.next_logprobs(verdict.wrap(p, c), (verdict.up, verdict.down), reward)
            for p, c in of_policy
        )
    )
    for adapter in (*loaded, zero):
        await engine.unload(adapter)
    speaker = RealSpeaker(model)
    folders = [tmp_path / "policy"] * len(PROMPTS) + [None] * len(PROMPTS)
    for (prompt, continuation), folder, sampled in zip(pairs, folders, samples, strict=True):
        expected = speaker.logprobs(folder, prompt, continuation)
        assert sampled.logprobs == pytest.approx(expected, **EQUAL)
    for (prompt, continuation), said in zip(of_policy, answers, strict=True):
        read = verdict.wrap(prompt, continuation)
        expected = speaker.next_logprobs(tmp_path / "reward", read, (verdict.up, verdict.down))
        assert said == pytest.approx(expected, **EQUAL)
    of_trainer = numbers(trunk, of_policy)
    for sampled, expected in zip(samples[: len(PROMPTS)], of_trainer.logprobs, strict=True):
        assert sampled.logprobs == pytest.approx(expected, **EQUAL)
    assert [up - down for up, down in answers] == pytest.approx(of_trainer.rewards, **EQUAL)


THUMBS = 60
ONE_ROUND = {
    "round": {"first_feedback": THUMBS, "max_rounds": 1},
    "lora": {"rank": 4, "alpha": 8.0},
    # Thumbs at random prove nothing, and no gate would let them through.
    "gate": {"enabled": False},
    "metrics": {"port": 0},
}


def train(folder: Path, model: Path, state: State) -> None:
    """Run the trainer's process until it has ended a round."""
    config = folder / "trainer.yaml"
    settings = {"state": {"folder": str(state.folder)}, "model": {"path": str(model)}}
    config.write_text(yaml.safe_dump(ONE_ROUND | settings))
    command = [sys.executable, "-m", "trainer", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "published version 1" in done.stdout, done.stdout


@pytest.mark.timeout(180)
async def test_it_is_rewarded_trained_and_swapped(serving: Serving, tmp_path: Path):
    server = serving.server

    async def ask_and_rate(number: int) -> None:
        user = str(number)
        reply = await server.generate(f"film {number}", user_id=user)
        assert not reply.reranked
        await server.client.rate(reply.response_id, up=number % 2 == 0, user_id=user)

    await asyncio.gather(*(ask_and_rate(number) for number in range(THUMBS)))
    await asyncio.to_thread(train, tmp_path, serving.model, serving.state)
    await server.serves(1)
    reply = await server.generate("film", include_candidates=True)
    assert reply.policy_version == 1
    assert reply.reranked
    assert all(candidate.HasField("reward") for candidate in reply.candidates)
