import json
from pathlib import Path

import pytest

from demo.settings import Options, has_chat_template, server_settings, trainer_settings
from thumbloop.config import ServerConfig, TrainerConfig


def options(folder: Path, model: str | None = None) -> Options:
    return Options("praise", 3, 6, False, model, folder, 8.0)


def model_of(folder: Path, **config: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_both_applications_take_the_settings_and_share_state_model_and_seed(tmp_path):
    model = model_of(tmp_path / "model", max_position_embeddings=512)
    server = ServerConfig(**server_settings(options(tmp_path), model))
    trainer = TrainerConfig(**trainer_settings(options(tmp_path), model))
    assert (server.state, server.model, server.seed) == (
        trainer.state,
        trainer.model,
        trainer.seed,
    )
    assert server.engine.threads == trainer.resources.threads == 1


@pytest.mark.parametrize(
    ("config", "served"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 32768}, 1024),
        ({"n_positions": 256}, 256),
    ],
)
def test_of_a_long_context_only_what_is_needed_is_served(tmp_path, config, served):
    model = model_of(tmp_path / "model", **config)
    settings = server_settings(options(tmp_path, "somebody/elses"), model)
    assert settings["engine"]["max_model_len"] == served


def test_a_model_says_whether_it_knows_turns(tmp_path, tiny_model):
    assert has_chat_template(tiny_model)
    assert not has_chat_template(model_of(tmp_path / "plain"))
    settings = tmp_path / "plain" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(tmp_path / "plain")
