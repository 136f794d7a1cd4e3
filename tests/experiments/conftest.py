from pathlib import Path

import pytest
import torch

from tests.publishing import ALPHA, RANK, Publisher, RealSpeaker
from tests.rows import candidate, interaction
from thumbloop.config import State, TrainerConfig, Verdict
from thumbloop.config.trainer import Lora
from thumbloop.rendering import verdict_tokens
from thumbloop.store import interactions, open_store
from thumbloop.types import Candidate

PROMPTS = [tuple(range(20 + 3 * i, 25 + 4 * i)) for i in range(4)]


@pytest.fixture(scope="session")
def learned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerConfig:
    """A state folder with one version, and what it answered: four prompts, three of them with two candidates."""
    from transformers import AutoTokenizer

    state = State(folder=tmp_path_factory.mktemp("learned"))
    tokens = verdict_tokens(Verdict(), AutoTokenizer.from_pretrained(tiny_model))
    speaker, store = RealSpeaker(tiny_model), open_store(state)
    version = Publisher(tiny_model, state.versions, store, tokens, speaker).publish(1)
    policy = state.versions / version.folder / "policy"
    source = torch.Generator().manual_seed(0)

    def sampled(index: int, prompt: tuple[int, ...], length: int) -> Candidate:
        ids = tuple(torch.randint(20, 250, (length,), generator=source).tolist())
        return candidate(index, token_ids=ids, logprobs=speaker.logprobs(policy, prompt, ids))

    with store.begin() as connection:
        for number, prompt in enumerate(PROMPTS):
            group = [sampled(i, prompt, 3 + number + i) for i in range(1 if number == 2 else 2)]
            reply = interaction(prompt_token_ids=prompt, candidates=tuple(group))
            interactions.append(connection, reply)
    store.dispose()
    return TrainerConfig(state=state, lora=Lora(rank=RANK, alpha=ALPHA))
