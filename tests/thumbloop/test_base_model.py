import threading
from pathlib import Path

import pytest

from thumbloop import artifacts, base_model
from thumbloop.artifacts import BaseModelIdentity
from thumbloop.base_model import claim_base, identify, locate
from thumbloop.config import Model
from thumbloop.errors import SettingsError
from thumbloop.types import DEFAULT_POLICY

IDENTITY = BaseModelIdentity(digest="d" * 64, tokenizer_digest="t" * 64)


def test_a_folder_is_taken_as_it_is(tmp_path: Path):
    assert locate(Model(path=str(tmp_path))) == tmp_path


def test_no_model_at_all_is_answered_with_what_to_do():
    with pytest.raises(SettingsError, match=r"model\.path: no model is set; .*make serve"):
        locate(Model())


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "~/missing", "a/b/c", "missing"])
def test_a_folder_that_is_missing_is_named_without_asking_the_hub(path: str):
    with pytest.raises(SettingsError, match=rf"model\.path: there is no folder {path}"):
        locate(Model(path=path))


def test_the_base_models_folder_is_written_once(tmp_path: Path):
    claim_base(tmp_path, DEFAULT_POLICY, IDENTITY, 1.0)
    claim_base(tmp_path, DEFAULT_POLICY, IDENTITY, 2.0)
    manifest = artifacts.read_manifest(tmp_path / "default/000000")
    assert (manifest.version, manifest.parent, manifest.created_at) == (0, None, 1.0)
    assert manifest.files == {}


@pytest.mark.parametrize("field", ["digest", "tokenizer_digest"])
def test_state_of_another_base_model_is_refused(tmp_path: Path, field: str):
    claim_base(tmp_path, DEFAULT_POLICY, IDENTITY, 1.0)
    other = IDENTITY.model_copy(update={field: "o" * 64})
    with pytest.raises(SettingsError, match=r"another base model.*state\.folder"):
        claim_base(tmp_path, DEFAULT_POLICY, other, 2.0)


def test_server_and_trainer_may_claim_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writes: list[int] = []
    real = base_model.write_version
    both_started = threading.Barrier(2)

    def slow(*arguments):
        writes.append(1)
        threading.Event().wait(0.1)
        return real(*arguments)

    def claim() -> None:
        both_started.wait()
        claim_base(tmp_path, DEFAULT_POLICY, IDENTITY, 1.0)

    monkeypatch.setattr(base_model, "write_version", slow)
    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writes == [1]


def test_a_folder_that_is_no_model_is_a_settings_error(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"model\.path: .* no config\.json"):
        identify(tmp_path)


def test_a_models_identity_follows_weights_config_and_tokenizer(tmp_path: Path):
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in (*names, "README.md"):
        (tmp_path / name).write_text(name)
    before = identify(tmp_path)
    (tmp_path / "README.md").write_text("other words")
    assert identify(tmp_path) == before
    seen = {before.model_dump_json()}
    for name in names:
        (tmp_path / name).write_text("changed")
        seen.add(identify(tmp_path).model_dump_json())
    assert len(seen) == 4


def test_versions_that_cannot_be_written_are_a_setting_to_change(tmp_path):
    (tmp_path / "versions").write_text("in the way")
    identity = BaseModelIdentity(digest="a", tokenizer_digest="b")
    with pytest.raises(SettingsError, match=r"state\.folder: .* cannot be written"):
        claim_base(tmp_path / "versions", "default", identity, 0.0)
