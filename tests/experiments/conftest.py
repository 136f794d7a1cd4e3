from pathlib import Path

import pytest

from tests.publishing import ALPHA, RANK, Publisher, RealSpeaker
from tests.rows import interaction
from thumbloop.config import State, TrainerConfig, Verdict
from thumbloop.config.trainer import Lora
from thumbloop.rendering import verdict_tokens
from thumbloop.store import interactions, open_store

PROMPTS = [tuple(range(20 + 3 * i, 25 + 4 * i)) for i in range(4)]


@pytest.fixture(scope="session")
def learned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerConfig:
    """A state with a version and four prompts: one asked twice, one not to be trained on."""
    from transformers import AutoTokenizer

    state = State(folder=tmp_path_factory.mktemp("learned"))
    tokens = verdict_tokens(Verdict(), AutoTokenizer.from_pretrained(tiny_model))
    store = open_store(state)
    Publisher(tiny_model, state.versions, store, tokens, RealSpeaker(tiny_model)).publish(1)
    with store.begin() as connection:
        for prompt in (*PROMPTS, PROMPTS[0]):
            is_asked = prompt != PROMPTS[2]
            reply = interaction(prompt_token_ids=prompt, trainable=is_asked)
            interactions.append(connection, reply)
    store.dispose()
    return TrainerConfig(state=state, lora=Lora(rank=RANK, alpha=ALPHA))
