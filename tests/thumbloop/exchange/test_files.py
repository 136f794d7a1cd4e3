import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rows import ANN, candidate, interaction
from thumbloop.errors import BadDataFile
from thumbloop.exchange import files, parquet, shapes
from thumbloop.exchange.shapes import Record, Shape
from thumbloop.store.exports import Rolled
from thumbloop.types import Message, Prompt, Role

TURNS = [{"role": "user", "content": "How was it? 👋"}]
REPLY = [{"role": "assistant", "content": "Good.\nVery."}]
ORIGIN = {
    "response_id": "r",
    "policy_version": 3,
    "subject": "",
    "user_id": "ann",
    "created_at": "2026-01-02T03:04:05+00:00",
}
ROLLED = Rolled(
    interaction(
        prompt=Prompt(messages=(Message(Role.USER, "How?"),)),
        candidates=(
            candidate(0, reward=float("-inf"), reward_components={"thumbs": -0.5}),
            candidate(1, reward=None, propensity=None, stage_rewards=(0.25, 0.5)),
        ),
    ),
    None,
    ((1, 0),),
)
ROLLOUTS = [
    shapes._rollout(ROLLED, has_origin=False),
    shapes._rollout(Rolled(interaction(user=ANN), True, ()), has_origin=False),
]
DATA: dict[str, tuple[Shape, list[Record]]] = {
    "texts": (Shape.KTO, [{"prompt": "The sky is", "completion": " blue.", "label": True}] * 3),
    "chats": (Shape.KTO, [{"prompt": TURNS, "completion": REPLY, "label": False}] * 3),
    "origin": (Shape.KTO, [{"prompt": "a", "completion": "b", "label": True, **ORIGIN}]),
    "pairs": (Shape.DPO, [{"prompt": "The sky is", "chosen": " blue.", "rejected": " red."}]),
    "chat pairs": (Shape.DPO, [{"prompt": TURNS, "chosen": REPLY, "rejected": REPLY}]),
    "rollouts": (Shape.ROLLOUTS, ROLLOUTS),
    "nothing": (Shape.DPO, []),
}


def records(path: Path) -> list[Record | None]:
    return [line.record for line in files.read(path)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", DATA)
def test_what_is_written_is_read(tmp_path: Path, name: str, suffix: str):
    shape, data = DATA[name]
    path = tmp_path / f"data.{suffix}"
    assert files.write(path, path, shape, iter(data)) == len(data)
    assert records(path) == data


def test_many_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "_ROWS", 2)
    data = [{"prompt": str(i), "completion": "b", "label": True} for i in range(5)]
    path = tmp_path / "data.parquet"
    files.write(path, path, Shape.KTO, iter(data))
    assert records(path) == data


def test_json_lines_hold_a_record_each_and_letters_as_they_are(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    files.write(path, path, Shape.KTO, DATA["chats"][1][:1])
    line = path.read_text(encoding="utf-8")
    assert line.count("\n") == 1
    assert "👋" in line
    assert json.loads(line)["label"] is False


def test_a_line_that_is_no_record_says_so_and_the_others_are_read(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[2]\n{"a": \n\xff\n"x"\n{"a": 3}\n' + b"[" * 100_000)
    lines = list(files.read(path))
    assert [line.number for line in lines] == [1, 3, 4, 5, 6, 7, 8]
    assert [line.record for line in lines] == [{"a": 1}, None, None, None, None, {"a": 3}, None]
    assert lines[1].problem == "is no JSON object"
    assert lines[2].problem.startswith("is no JSON: ")
    assert lines[3].problem == "is not UTF-8"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str):
    path = tmp_path / f"nowhere.{suffix}"
    with pytest.raises(BadDataFile, match=r"nowhere.* cannot be read: .*No such file"):
        records(path)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path):
    path = tmp_path / "data.parquet"
    path.write_text("no Parquet")
    with pytest.raises(BadDataFile, match=r"data\.parquet is no Parquet file"):
        records(path)


def test_a_name_says_what_a_file_holds(tmp_path: Path):
    with pytest.raises(BadDataFile, match=r"has to end with \.jsonl or \.parquet"):
        files.check_name(tmp_path / "data.csv")


def test_without_pyarrow_parquet_names_the_extra_and_json_lines_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadDataFile, match=r"pip install '\.\[data\]'"):
        files.check_name(tmp_path / "data.parquet")
    path = tmp_path / "data.jsonl"
    files.check_name(path)
    files.write(path, path, *DATA["texts"])
    assert records(path) == DATA["texts"][1]


# Replacing


def test_a_file_takes_its_place_whole(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    with files.replacing(path, force=False) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_what_is_interrupted_leaves_what_there_was(tmp_path: Path, failure: type[BaseException]):
    path = tmp_path / "data.jsonl"
    path.write_text("old")

    def write() -> None:
        with files.replacing(path, force=True) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_there_is_replaced_on_demand_only(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text("old")
    with pytest.raises(BadDataFile, match="--force"), files.replacing(path, force=False):
        pass
    with files.replacing(path, force=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path):
    path = tmp_path / "data.jsonl"

    def write() -> None:
        with files.replacing(path, force=False) as temporary:
            temporary.write_text("ours")
            path.write_text("theirs")

    with pytest.raises(BadDataFile, match="is there already"):
        write()
    assert path.read_text() == "theirs"


@pytest.mark.parametrize("name", ["nowhere/data.jsonl", "."])
def test_where_nothing_can_be_written_is_named(tmp_path: Path, name: str):
    def write() -> Any:
        with files.replacing(tmp_path / name, force=True) as temporary:
            temporary.write_text("new")

    with pytest.raises(BadDataFile, match=r"cannot be written|is a folder"):
        write()
