"""Environments: made once, anew when what they are made from changed, and never half."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtest import environments
from loadtest.environments import NotInstalled, environment, torch_in

ROOT = Path(environments.__file__).parents[1]
LOCKS = sorted(path.stem for path in (ROOT / "locks").glob("trl-*.txt"))


class Commands:
    """Stands for venv and pip: notes what is run, and fails what holds a word."""

    def __init__(self) -> None:
        self.run: list[str] = []
        self.failing = ("nothing",)

    def __call__(self, command: Sequence[str], log: Path) -> bool:
        line = " ".join(command)
        self.run.append(line)
        failed = any(word in line for word in self.failing)
        with log.open("a") as output:
            output.write(f"{line}\n{'no such package' if failed else 'done'}\n")
        if "-m venv" in line:
            Path(command[-1]).mkdir()
        return not failed


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    stub = Commands()
    monkeypatch.setattr(environments, "_succeeds", stub)
    monkeypatch.setattr(environments, "_LOCKS", tmp_path)
    (tmp_path / "peer.txt").write_text("numpy==1.26.4\ntorch==2.13.0\n")
    return stub


def test_an_environment_is_made_from_its_lock_without_resolving(commands: Commands, tmp_path: Path):
    python = environment("peer", tmp_path / "made")
    assert python == tmp_path / "made" / "peer" / "bin" / "python"
    venv, torch, rest = commands.run
    assert venv.endswith(f"-m venv {tmp_path / 'made' / 'peer'}")
    assert torch.startswith(f"{python} -m pip install ")
    assert torch.endswith("--no-deps torch==2.13.0+cpu")
    assert rest.endswith(f"--no-deps -r {tmp_path / 'peer.txt'}")


def test_one_for_a_gpu_stands_beside_it_with_the_torch_of_the_index(
    commands: Commands, tmp_path: Path
):
    environment("peer", tmp_path / "made")
    commands.run.clear()
    python = environment("peer", tmp_path / "made", has_gpu=True)
    assert python == tmp_path / "made" / "peer-gpu" / "bin" / "python"
    _, torch, rest = commands.run
    assert torch == f"{python} -m pip install --disable-pip-version-check torch==2.13.0"
    assert rest.endswith(f"--no-deps -r {tmp_path / 'peer.txt'}")
    commands.failing = ("torch==",)
    (tmp_path / "peer.txt").write_text("torch==2.13.1\n")
    with pytest.raises(NotInstalled, match=r"peer-gpu: installing torch==2\.13\.1 failed"):
        environment("peer", tmp_path / "made", has_gpu=True)


def test_it_is_kept_until_its_lock_changes(commands: Commands, tmp_path: Path):
    environment("peer", tmp_path / "made")
    commands.run.clear()
    environment("peer", tmp_path / "made")
    assert commands.run == []
    (tmp_path / "peer.txt").write_text("numpy==1.26.5\ntorch==2.13.0\n")
    environment("peer", tmp_path / "made")
    assert len(commands.run) == 3


def test_one_that_moved_is_made_anew(commands: Commands, tmp_path: Path):
    environment("peer", tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "moved")
    commands.run.clear()
    environment("peer", tmp_path / "moved")
    assert len(commands.run) == 3


def test_where_the_indexes_have_no_cpu_build_torchs_own_has(commands: Commands, tmp_path: Path):
    def fails_without_index(command: Sequence[str], log: Path) -> bool:
        return commands(command, log) and ("+cpu" not in command[-1] or "--index-url" in command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environments, "_succeeds", fails_without_index)
        environment("peer", tmp_path / "made")
    index = commands.run[2].partition("--index-url ")[2].split()[0]
    assert f"torch_cpu_index={index}\n" in (ROOT / "scripts/setup").read_text()
    assert len(commands.run) == 4


@pytest.mark.parametrize(
    ("failing", "what"),
    [
        ("venv", "creating it"),
        ("+cpu", r"installing torch==2.13.0\+cpu"),
        (" -r ", "installing .*t"),
    ],
)
def test_what_cannot_be_installed_is_said_and_tried_again(
    commands: Commands, tmp_path: Path, failing: str, what: str
):
    commands.failing = (failing,)
    words = rf"environment peer: {what} failed; the end of .*peer.log:\n(.|\n)*no such package"
    with pytest.raises(NotInstalled, match=words):
        environment("peer", tmp_path / "made")
    commands.failing = ("nothing",)
    commands.run.clear()
    environment("peer", tmp_path / "made")
    assert len(commands.run) == 3


@pytest.mark.parametrize("name", LOCKS)
def test_every_lock_is_exact(name: str):
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    names = [line.partition("==")[0] for line in packages]
    assert names == sorted(set(names))
    assert all(line.count("==") == 1 and ";" not in line for line in packages)
    assert name.replace("-", "==") in packages
    assert torch_in("\n".join(packages)) in packages
