"""Which version the next one grows from: 0 <- 1 <- 2 <- 3, which is current."""

from dataclasses import replace

import pytest

from tests.rows import version
from thumbloop.config.trainer import Round
from thumbloop.types import VersionState
from trainer.parents import next_parent

REBUILDS = Round(rebuild_tainted=True)
CURRENT, ROLLED_BACK = VersionState.CURRENT, VersionState.ROLLED_BACK


def family(*tainted, **states):
    states = {"v3": CURRENT, **states}
    return [
        version(
            number,
            number - 1 if number else None,
            state=states.get(f"v{number}", VersionState.RETIRED),
            is_tainted=number in tainted,
        )
        for number in range(4)
    ]


@pytest.fixture
def folder(tmp_path):
    for row in family():
        (tmp_path / row.folder).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("known", "number"),
    [
        (family(), 3),
        (family(3), 2),
        (family(2, 3), 1),
        (family(1, 2, 3), 0),
        (family(2, 3, v1=ROLLED_BACK), 0),
        (family(2, 3, v3=VersionState.RETIRED, v1=CURRENT), 1),
    ],
)
def test_the_next_version_grows_from_the_last_good_one(known, number, folder):
    assert next_parent(known, REBUILDS, folder).version == number


def test_without_the_setting_it_grows_from_the_current_one(folder):
    assert next_parent(family(2, 3), Round(), folder).version == 3


def test_a_version_whose_folder_is_gone_teaches_nobody(folder):
    known = family(3)
    (folder / known[2].folder).rmdir()
    assert next_parent(known, REBUILDS, folder).version == 1
    (folder / known[1].folder).rmdir()
    (folder / known[0].folder).rmdir()
    assert next_parent(known, REBUILDS, folder).version == 0


def test_a_clean_current_version_needs_no_folder_to_be_found(tmp_path):
    assert next_parent([replace(family()[3])], REBUILDS, tmp_path).version == 3
