import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thumbloop import artifacts
from thumbloop.artifacts import BaseModelIdentity, Manifest
from thumbloop.errors import BadPolicyVersion, SettingsError
from thumbloop.types import DEFAULT_POLICY

IDENTITY = BaseModelIdentity(digest="d" * 64, tokenizer_digest="t" * 64)
MANIFEST = Manifest(policy=DEFAULT_POLICY, version=1, parent=0, created_at=1.5, base_model=IDENTITY)


def fill(folder: Path, manifest: Manifest = MANIFEST) -> Manifest:
    for role in ("policy", "reward"):
        (folder / role).mkdir()
        (folder / role / "adapter_config.json").write_text("{}")
        (folder / role / "adapter_model.safetensors").write_bytes(role.encode() * 1000)
    return manifest


def write(versions: Path, version: int = 1) -> artifacts.WrittenVersion:
    manifest = MANIFEST.model_copy(update={"version": version})
    return artifacts.write_version(
        versions, DEFAULT_POLICY, version, lambda folder: fill(folder, manifest)
    )


def visible(versions: Path) -> list[str]:
    """Return the folders that carry a version's name."""
    return sorted(p.name for p in versions.glob("*/*") if not p.name.startswith("."))


def test_a_version_is_read_as_it_was_written(tmp_path: Path):
    written = write(tmp_path)
    folder = tmp_path / written.folder
    manifest = artifacts.read_manifest(folder, written.manifest_digest)
    artifacts.verify_files(folder, manifest)
    assert written.folder == "default/000001"
    assert manifest == written.manifest
    assert manifest.model_copy(update={"files": {}}) == MANIFEST
    assert sorted(manifest.files) == [
        "policy/adapter_config.json",
        "policy/adapter_model.safetensors",
        "reward/adapter_config.json",
        "reward/adapter_model.safetensors",
    ]


def _remove_weights(folder: Path) -> None:
    (folder / "policy" / "adapter_model.safetensors").unlink()


def _flip_a_bit(folder: Path) -> None:
    path = folder / "reward" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "policy" / "adapter_model.safetensors", 10)


def _add_a_file(folder: Path) -> None:
    (folder / "policy" / "adapter_model.bin").write_bytes(b"pickle")


def _link_a_file(folder: Path) -> None:
    path = folder / "policy" / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def _link_a_folder(folder: Path) -> None:
    (folder / "policy").rename(folder.parent / "elsewhere")
    (folder / "policy").symlink_to(folder.parent / "elsewhere")


def _dangle(folder: Path) -> None:
    (folder / "policy" / "more").symlink_to("/nowhere")


def _add_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "policy" / "more")


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (_remove_weights, "file_missing"),
        (_flip_a_bit, "file_altered"),
        (_truncate, "file_altered"),
        (_add_a_file, "extra_file"),
        (_link_a_file, "link"),
        (_link_a_folder, "link"),
        (_dangle, "link"),
        (_add_a_pipe, "extra_file"),
    ],
)
def test_every_way_to_tamper_with_files_has_its_reason(
    tmp_path: Path, tamper: Callable[[Path], None], reason: str
):
    written = write(tmp_path)
    folder = tmp_path / written.folder
    tamper(folder)
    manifest = artifacts.read_manifest(folder, written.manifest_digest)
    with pytest.raises(BadPolicyVersion) as raised:
        artifacts.verify_files(folder, manifest)
    assert raised.value.reason == reason


def test_a_file_that_cannot_be_read_is_the_versions_fault_not_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written = write(tmp_path)

    def fail(_path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(artifacts, "file_digest", fail)
    with pytest.raises(BadPolicyVersion) as raised:
        artifacts.verify_files(tmp_path / written.folder, written.manifest)
    assert raised.value.reason == "file_unreadable"


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _pipe_the_manifest(folder: Path) -> None:
    _remove_manifest(folder)
    os.mkfifo(folder / "manifest.json")


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def _alter_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"parent": 0', '"parent": 9'))


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (_remove_manifest, "manifest_missing"),
        (_pipe_the_manifest, "manifest_missing"),
        (_remove_folder, "manifest_missing"),
        (_alter_manifest, "manifest_altered"),
    ],
)
def test_every_way_to_tamper_with_the_manifest_has_its_reason(
    tmp_path: Path, tamper: Callable[[Path], None], reason: str
):
    written = write(tmp_path)
    tamper(tmp_path / written.folder)
    with pytest.raises(BadPolicyVersion) as raised:
        artifacts.read_manifest(tmp_path / written.folder, written.manifest_digest)
    assert raised.value.reason == reason


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"surprise": 1}', "\xff"])
def test_a_manifest_that_is_none_is_malformed(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadPolicyVersion) as raised:
        artifacts.read_manifest(tmp_path)
    assert raised.value.reason == "manifest_malformed"


class Killed(Exception):
    """Stands for a writer that dies."""


def _die(*_arguments: object) -> None:
    raise Killed


def _die_while_filling(folder: Path) -> Manifest:
    (folder / "policy").mkdir()
    (folder / "policy" / "adapter_config.json").write_text("{")
    raise Killed


@pytest.mark.parametrize(
    "step", ["fill", "thumbloop.artifacts._digests", "os.fsync", "pathlib.Path.rename"]
)
def test_a_writer_that_dies_leaves_nothing_visible_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    with monkeypatch.context() as patch:
        if step != "fill":
            patch.setattr(step, _die)
        with pytest.raises(Killed):
            artifacts.write_version(
                tmp_path, DEFAULT_POLICY, 1, _die_while_filling if step == "fill" else fill
            )
    assert list((tmp_path / DEFAULT_POLICY).iterdir()) == []  # a full disk needs the room
    written = write(tmp_path)
    artifacts.verify_files(tmp_path / written.folder, written.manifest)
    assert artifacts.remove_unpublished(tmp_path, DEFAULT_POLICY, [1]) == []
    assert visible(tmp_path) == ["000001"]


_EXITS_IN_THE_MIDDLE = """
import os, sys
from pathlib import Path
from thumbloop import artifacts

def fill(folder):
    (folder / "weights").write_text("half")
    os._exit(9)

artifacts.write_version(Path(sys.argv[1]), "default", 1, fill)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path: Path):
    command = [sys.executable, "-c", _EXITS_IN_THE_MIDDLE, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 9
    assert visible(tmp_path) == []
    (leftover,) = artifacts.remove_unpublished(tmp_path, DEFAULT_POLICY, [0])
    assert leftover.endswith(".tmp")
    assert list((tmp_path / DEFAULT_POLICY).iterdir()) == []


def test_a_folder_that_is_there_is_never_replaced(tmp_path: Path):
    """A row may name it."""
    written = write(tmp_path)
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path)
    artifacts.verify_files(tmp_path / written.folder, written.manifest)
    assert [p.name for p in (tmp_path / DEFAULT_POLICY).iterdir()] == ["000001"]


def test_only_folders_without_a_row_are_removed(tmp_path: Path):
    for number in (1, 2, 3, 4):
        write(tmp_path, number)
    assert artifacts.remove_unpublished(tmp_path, DEFAULT_POLICY, [1, 3]) == ["000002", "000004"]
    assert visible(tmp_path) == ["000001", "000003"]
    assert artifacts.remove_unpublished(tmp_path, "another", []) == []


def test_what_no_writer_named_is_not_removed(tmp_path: Path):
    write(tmp_path, 1)
    kept = ["000001.bak", "lost+found", ".trash"]
    for name in [*kept, "000002", ".000002.77.tmp"]:
        (tmp_path / DEFAULT_POLICY / name).mkdir()
    removed = artifacts.remove_unpublished(tmp_path, DEFAULT_POLICY, [1])
    assert removed == [".000002.77.tmp", "000002"]
    assert {p.name for p in (tmp_path / DEFAULT_POLICY).iterdir()} == {"000001", *kept}


def test_folders_of_another_store_are_left_alone(tmp_path: Path):
    """A killed writer leaves the next number at most: more is of a store that knows of it."""
    for number in (1, 2):
        write(tmp_path, number)
    with pytest.raises(SettingsError, match=r"holds version 000002, of which the store knows"):
        artifacts.remove_unpublished(tmp_path, DEFAULT_POLICY, [0])
    assert visible(tmp_path) == ["000001", "000002"]


def test_what_was_written_can_be_discarded_unless_another_took_its_place(tmp_path: Path):
    written = write(tmp_path)
    folder = tmp_path / written.folder
    _alter_manifest(folder)
    artifacts.discard(tmp_path, written)
    assert folder.exists()
    shutil.rmtree(folder)
    artifacts.discard(tmp_path, write(tmp_path))
    assert not folder.exists()


def test_a_version_of_another_base_model_does_not_verify(tmp_path: Path):
    written = write(tmp_path)
    folder = tmp_path / written.folder
    artifacts.verify(folder, written.manifest_digest, IDENTITY)
    other = IDENTITY.model_copy(update={"digest": "o" * 64})
    with pytest.raises(BadPolicyVersion, match=r"wrong_base_model: 000001 was trained on another"):
        artifacts.verify(folder, written.manifest_digest, other)
    _flip_a_bit(folder)
    with pytest.raises(BadPolicyVersion, match="file_altered"):
        artifacts.verify(folder, written.manifest_digest, IDENTITY)
