import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from demo import base_model
from demo.base_model import VERDICT_DOWN, VERDICT_PROMPT, VERDICT_UP, Recipe, build
from demo.pretraining import Training
from thumbloop.errors import SettingsError

MICRO = Recipe(
    exchanges=40, vocabulary=400, layers=1, hidden=32, intermediate=32, heads=2,
    training=Training(rows_per_step=4),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base") / "model", recipe=MICRO)


def test_the_folder_loads_as_a_plain_hugging_face_model(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), _tokenizer(folder)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_special_tokens_are_one_token_each_and_any_text_survives_encoding(folder):
    tokenizer = _tokenizer(folder)
    for token in (VERDICT_PROMPT, VERDICT_UP, VERDICT_DOWN, "<|end|>", "<|user|>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    text = "Crème brûlée, 12 €, “très bon” 🍮\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_marks_turns_and_opens_the_reply(folder):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    text = _tokenizer(folder).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>Hi?<|end|><|assistant|>"


def test_a_finished_folder_is_returned_at_once(folder):
    before = (folder / "model.safetensors").stat()
    progress = []
    assert build(folder, recipe=MICRO, on_progress=progress.append) == folder
    assert not progress
    assert (folder / "model.safetensors").stat() == before


def test_progress_counts_to_the_end_and_the_same_seed_gives_the_same_weights(folder, tmp_path):
    progress = []
    again = build(tmp_path / "again", recipe=MICRO, on_progress=progress.append)
    assert [p.step for p in progress] == list(range(1, progress[0].steps + 1))
    weights = [AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (folder, again)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_another_recipe_replaces_the_model(tmp_path):
    folder = build(tmp_path / "model", recipe=MICRO)
    other = dataclasses.replace(MICRO, seed=1)
    build(folder, recipe=other)
    assert json.loads((folder / base_model.SEAL).read_text())["digest"] == other.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    def fail(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "model", recipe=MICRO, on_progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SettingsError, match="holds no base model"):
        build(tmp_path, recipe=MICRO)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be kept in .*file/model: "):
        build(tmp_path / "file" / "model", recipe=MICRO)


def test_the_demos_own_model_has_five_to_ten_million_parameters(folder):
    recipe = Recipe()
    config = base_model._config(recipe, _tokenizer(folder))
    config.vocab_size = recipe.vocabulary  # that tokenizer is the small recipe's
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert 5e6 < model.num_parameters() < 10e6


def test_the_default_folder_depends_on_the_seed():
    assert base_model.default_folder(0) != base_model.default_folder(1)


def _tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)
