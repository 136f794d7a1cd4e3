"""`thumbloop versions export`: a copy that others load, on a store that no server has open."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from peft import PeftModel
from sqlalchemy import Engine
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.fakes import FakeEngine
from tests.publishing import RANK, FakeSpeaker, Publisher
from tests.rows import ANN, finished_round, rated, version
from thumbloop import artifacts, cli, copying
from thumbloop.artifacts import Manifest
from thumbloop.config import State, Verdict
from thumbloop.rendering import verdict_tokens
from thumbloop.store import deployments, erasure, open_store, versions
from thumbloop.types import DEFAULT_POLICY, VersionState

PROMPT = torch.tensor([[40, 41, 42, 43]])


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(folder=tmp_path / "state")


@pytest.fixture
def store(state: State) -> Iterator[Engine]:
    engine = open_store(state)
    yield engine
    engine.dispose()


@pytest.fixture
def publisher(tiny_model: Path, state: State, store: Engine) -> Publisher:
    engine = FakeEngine(tiny_model)
    verdict = verdict_tokens(Verdict(), engine.tokenizer)
    return Publisher(tiny_model, state.versions, store, verdict, FakeSpeaker(engine))


@pytest.fixture
def export(state: State) -> Callable[..., Result]:
    def export(*arguments: object) -> Result:
        command = ["versions", "export", *map(str, arguments), "--state", str(state.folder)]
        return CliRunner().invoke(cli.app, command)

    return export


def described(manifest: Manifest) -> Manifest:
    return manifest.model_copy(
        update={
            "settings": {"ppo": {"kl_coef": 0.125}},
            "metrics": {"reward_auroc": 0.75, "kl": 0.5},
        }
    )


def header(card: str) -> Any:
    found = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    assert found is not None
    return yaml.safe_load(found[1])


@torch.inference_mode()
def logits(model: Path, folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()(PROMPT).logits


def test_peft_loads_a_copy_and_it_is_the_version(
    publisher: Publisher, export: Any, state: State, tiny_model: Path, tmp_path: Path
):
    published = publisher.publish(1)
    done = export(1, tmp_path / "copy")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"version 1 is in {tmp_path}/copy\n"
    folder = state.versions / published.folder
    for there, here in (("policy", "."), ("reward", "reward")):
        assert torch.equal(
            logits(tiny_model, folder / there), logits(tiny_model, tmp_path / "copy" / here)
        )
    assert not torch.equal(
        logits(tiny_model, tmp_path / "copy"), logits(tiny_model, tmp_path / "copy" / "reward")
    )


def test_a_copy_holds_what_was_published_and_no_link(
    publisher: Publisher, export: Any, state: State, tmp_path: Path
):
    published = publisher.publish(1)
    export(1, tmp_path / "deep" / "copy")
    copy = tmp_path / "deep" / "copy"
    names = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    assert names == {"README.md", *adapter, *(f"reward/{name}" for name in adapter)}
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["copy"]
    original = state.versions / published.folder / "policy" / adapter[1]
    assert (copy / adapter[1]).stat().st_ino != original.stat().st_ino
    shutil.rmtree(state.versions / published.folder)
    assert artifacts.file_digest(copy / adapter[1]) == published.policy_digest


def test_the_card_says_what_it_is_and_where_it_comes_from(
    publisher: Publisher, export: Any, store: Engine, tmp_path: Path
):
    with store.begin() as connection:
        replies = [rated(connection, 1) for _ in range(3)]
        used = {
            "new_feedback": tuple(feedback_id for _, feedback_id in replies),
            "rollouts": tuple(response_id for response_id, _ in replies[:2]),
        }
        versions.finish_round(connection, finished_round(1, **used), version(1))
    publisher.publish(2, alter=described)
    with store.begin() as connection:
        deployments.set_state(connection, DEFAULT_POLICY, 2, VersionState.CURRENT, at=1.7e9)
    done = export(2, tmp_path / "copy", "--base-model", "someone/base")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "copy" / "README.md").read_text()
    assert header(card) == {
        "base_model": "someone/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "rlhf", "ppo", "thumbloop"],
    }
    assert "# Version 2 of policy default" in card
    assert "Its state there, since 2023-11-14: current." in card
    assert f"a `--max-lora-rank` of {RANK} or more" in card
    assert "| `reward_auroc` | 0.75 |" in card
    assert '"kl_coef": 0.125' in card
    assert 'AutoModelForCausalLM.from_pretrained("someone/base")' in card
    assert artifacts.file_digest(tmp_path / "copy" / "adapter_model.safetensors") in card
    assert "erased" not in card


def test_the_card_counts_what_the_whole_line_learned_from(
    publisher: Publisher, export: Any, store: Engine, tmp_path: Path
):
    first = publisher.write(1)
    with store.begin() as connection:
        replies = [rated(connection, 1) for _ in range(3)]
        done = finished_round(
            1,
            round_id=first.round_id,
            new_feedback=tuple(number for _, number in replies),
            rollouts=tuple(name for name, _ in replies[:2]),
        )
        versions.finish_round(connection, done, first)
    publisher.publish(2, 1)
    assert export(2, tmp_path / "copy").exit_code == 0
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "3 thumbs and preferences, in 2 rounds" in card
    assert "| 2 | 0 new | 0 | 0 |\n| 1 | 3 new | 0 | 2 |\n| 0, the base model |" in card
    assert "base_model" not in header(card)  # nobody said how it is called


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("gpt2", "gpt2"),
        ("/srv/models/ours", None),
        ("./ours", None),
        ("models/of/ours", None),
        (None, None),
    ],
)
def test_a_place_on_this_machine_is_nobodys_name_for_the_base_model(
    publisher: Publisher, export: Any, tmp_path: Path, name: str | None, shown: str | None
):
    def rename(draft: Path) -> None:
        path = draft / "policy" / "adapter_config.json"
        value = "null" if name is None else f'"{name}"'
        text = path.read_text()
        path.write_text('{"base_model_name_or_path": ' + value + ", " + text[1:])

    publisher.publish(1, spoil=rename)
    assert export(1, tmp_path / "copy").exit_code == 0
    card = (tmp_path / "copy" / "README.md").read_text()
    assert header(card).get("base_model") == shown


def test_a_version_that_learned_from_what_was_erased_says_so(
    publisher: Publisher, export: Any, store: Engine, tmp_path: Path
):
    first = publisher.write(1)
    with store.begin() as connection:
        _, number = rated(connection, 1)
        done = finished_round(1, round_id=first.round_id, new_feedback=(number,))
        versions.finish_round(connection, done, first)
        erasure.erase(connection, DEFAULT_POLICY, ANN, at=1.0, actor="operator")
    publisher.publish(2, 1)
    done = export(2, tmp_path / "copy")
    assert done.exit_code == 0
    assert done.stderr.startswith("warning: version 2, or one it grew from, learned from data")
    assert "had erased since" in (tmp_path / "copy" / "README.md").read_text()


def _delete(state: State, store: Engine) -> None:
    with store.begin() as connection:
        deployments.set_state(connection, DEFAULT_POLICY, 1, VersionState.RETIRED, at=1.0)
        deployments.collect(connection, DEFAULT_POLICY, 1, at=1.0, reason="space")
    artifacts.set_aside(state.versions, DEFAULT_POLICY, 1)


def _lose(state: State, _store: Engine) -> None:
    shutil.rmtree(state.versions / "default/000001")


def _alter(state: State, _store: Engine) -> None:
    path = state.versions / "default/000001/policy/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _link(state: State, _store: Engine) -> None:
    path = state.versions / "default/000001/policy/adapter_model.safetensors"
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_delete, "the folder of version 1 was deleted"),
        (_lose, "manifest_missing: "),
        (_alter, "file_altered: "),
        (_link, "link: "),
    ],
)
def test_what_is_not_what_was_published_is_not_copied(
    publisher: Publisher,
    export: Any,
    state: State,
    store: Engine,
    tmp_path: Path,
    spoil: Callable[[State, Engine], None],
    said: str,
):
    publisher.publish(1)
    spoil(state, store)
    done = export(1, tmp_path / "copy")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: {said}")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("number", "said"), [(0, "version 0 is the base model"), (7, "there is no version 7")]
)
def test_a_version_without_an_adapter_is_not_copied(
    store: Engine, export: Any, tmp_path: Path, number: int, said: str
):
    done = export(number, tmp_path / "copy")
    assert (done.exit_code, done.stderr.startswith(f"error: {said}")) == (1, True)
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_nothing_that_is_there_is_replaced(publisher: Publisher, export: Any, tmp_path: Path):
    publisher.publish(1)
    (tmp_path / "copy").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("copy", "link"):
        done = export(1, tmp_path / name)
        assert (done.exit_code, "is there already" in done.stderr) == (1, True)
    assert list((tmp_path / "copy").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_nothing(
    publisher: Publisher,
    export: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
):
    publisher.publish(1)

    def fail(_path: Path) -> None:
        raise failure

    monkeypatch.setattr(copying, "sync", fail)
    assert export(1, tmp_path / "copy").exit_code != 0
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


def test_a_file_that_changes_while_it_is_copied_is_found_out(
    publisher: Publisher, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publisher.publish(1)
    copyfile = shutil.copyfile

    def change(source: Path, to: Path) -> None:
        copyfile(source, to)
        to.write_bytes(to.read_bytes() + b"x")

    monkeypatch.setattr(copying.shutil, "copyfile", change)
    done = export(1, tmp_path / "copy")
    assert done.stderr.startswith("error: file_altered: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
