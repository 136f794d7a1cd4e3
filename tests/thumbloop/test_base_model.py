from pathlib import Path

import pytest

from thumbloop.base_model import locate
from thumbloop.config import Model
from thumbloop.errors import SettingsError


def test_a_folder_is_taken_as_it_is(tmp_path: Path):
    assert locate(Model(path=str(tmp_path))) == tmp_path


def test_no_model_at_all_is_answered_with_what_to_do():
    with pytest.raises(SettingsError, match=r"model\.path: no model is set; .*make serve"):
        locate(Model())


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "~/missing", "a/b/c", "missing"])
def test_a_folder_that_is_missing_is_named_without_asking_the_hub(path: str):
    with pytest.raises(SettingsError, match=rf"model\.path: there is no folder {path}"):
        locate(Model(path=path))
