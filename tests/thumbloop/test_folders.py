from pathlib import Path

import pytest

from thumbloop import folders
from thumbloop.folders import make_folder


def test_a_new_folder_is_synced_where_it_is_entered_and_so_are_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[Path] = []
    monkeypatch.setattr(folders, "sync", synced.append)
    make_folder(tmp_path / "state" / "versions")
    assert (tmp_path / "state" / "versions").is_dir()
    assert synced == [tmp_path, tmp_path / "state"]
    make_folder(tmp_path / "state" / "versions")
    assert len(synced) == 2


def test_a_file_in_the_way_is_an_error(tmp_path: Path):
    (tmp_path / "state").write_text("")
    with pytest.raises(OSError, match="exists"):
        make_folder(tmp_path / "state")
