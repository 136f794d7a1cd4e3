"""What `thumbloop export` writes is what TRL trains on, as it is."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from typer.testing import CliRunner

from tests.rows import ANN, candidate, rated
from thumbloop import cli
from thumbloop.config import State
from thumbloop.rendering import render
from thumbloop.store import open_store, preferences
from thumbloop.types import Message, Prompt, Role

CHAT = Prompt(messages=(Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "How was it?")))
TEXT = Prompt(text="The soup was")
READERS = {"jsonl": "json", "parquet": "parquet"}

pytestmark = pytest.mark.filterwarnings("ignore")  # what TRL and its imports have to say of torch


@pytest.fixture
def store(state: State):
    engine = open_store(state)
    yield engine
    engine.dispose()


@pytest.fixture(params=[CHAT, TEXT], ids=["chat", "text"])
def prompt(request: pytest.FixtureRequest, store: Engine) -> Prompt:
    """Return what a thumb up, a thumb down and two preferences were given on."""
    with store.begin() as connection:
        for thumb in (1, 0):
            shown = tuple(candidate(i, chosen=i == thumb) for i in range(2))
            reply, _ = rated(connection, thumb, prompt=request.param, candidates=shown)
            preferences.submit_preference(connection, reply, 1, 0, ANN, at=1.0)
    return request.param


@pytest.fixture
def exported(state: State, tmp_path: Path) -> Callable[[str, str], Any]:
    """Export in a shape to a kind of file, and read that with `datasets`."""
    from datasets import load_dataset

    def exported(shape: str, suffix: str) -> Any:
        path = tmp_path / f"{shape}.{suffix}"
        arguments = ["export", shape, str(path), "--state", str(state.folder)]
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
        cache = str(tmp_path / "cache")
        return load_dataset(READERS[suffix], data_files=str(path), split="train", cache_dir=cache)

    return exported


def options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }


def said(trainer: Any, column: str) -> list[str]:
    """Return what the trainer made of a column, as text."""
    return trainer.processing_class.batch_decode(list(trainer.train_dataset[column]))


def check_prompts(trainer: Any, prompt: Prompt) -> None:
    """TRL's trainer reads the prompts as the policy reads them that is served."""
    served = [*render(prompt, trainer.processing_class)]
    assert list(trainer.train_dataset["prompt_ids"]) == [served] * 2


@pytest.mark.parametrize("suffix", READERS)
def test_preferences_are_read_by_dpo(
    prompt: Prompt, exported: Callable[..., Any], tiny_model: Path, tmp_path: Path, suffix: str
):
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        str(tiny_model),
        args=DPOConfig(**options(tmp_path / "out")),
        train_dataset=exported("dpo", suffix),
    )
    check_prompts(trainer, prompt)
    assert said(trainer, "chosen_ids") == ["reply 1<|end|>"] * 2
    assert said(trainer, "rejected_ids") == ["reply 0<|end|>"] * 2
    loss = trainer.train().training_loss
    assert loss == pytest.approx(math.log(2), abs=1e-3), "nothing is learned yet"


@pytest.mark.parametrize("suffix", READERS)
def test_thumbs_are_read_by_kto(
    prompt: Prompt, exported: Callable[..., Any], tiny_model: Path, tmp_path: Path, suffix: str
):
    from trl import KTOConfig, KTOTrainer

    trainer = KTOTrainer(
        str(tiny_model),
        args=KTOConfig(**options(tmp_path / "out")),
        train_dataset=exported("kto", suffix),
    )
    check_prompts(trainer, prompt)
    assert said(trainer, "completion_ids") == ["reply 1<|end|>", "reply 0<|end|>"]
    assert list(trainer.train_dataset["label"]) == [True, False]
    loss = trainer.train().training_loss
    assert loss == pytest.approx(0.5, abs=1e-3), "nothing is learned yet"
