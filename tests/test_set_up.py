"""scripts/setup with an interpreter that only takes notes, what it installs, and the Makefile."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

INTERPRETER = f"""#!/bin/bash
# Stands in for python3: notes what it is told, and fails where the notes' `fail` file says so.
note() {{
    echo "$*" >>NOTES
    if [[ -f NOTES.fail && "$*" =~ $(<NOTES.fail) ]]; then exit 1; fi
}}
case "$1 $2" in
    "-c "*_base_executable*) echo "$0" ;;
    "-c "*importlib.metadata*) exit 1 ;;
    "-c "*ctypes*) exit 0 ;;
    "-c "*) exec {sys.executable} "$@" ;;
    "--version ") echo "Python 3.11" ;;
    "-m venv")
        note venv
        rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
        ;;
    "-m pip")
        note "$@"
        if [[ "$*" == *uv==* ]]; then
            printf '#!/bin/bash\\nexec "$(dirname "$0")/python" -m pip uv "$@"\\n' >"$(dirname "$0")/uv"
            chmod +x "$(dirname "$0")/uv"
        fi
        ;;
esac
"""


@dataclass(frozen=True)
class Project:
    """A copy of what scripts/setup reads, and the notes of the interpreter that it finds."""

    root: Path

    def command(self, **environment: str) -> tuple[list[str], dict[str, str]]:
        path = f"{self.root / 'bin'}:/usr/bin:/bin"
        return [str(self.root / "scripts/setup")], {"PATH": path, **environment}

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command, env = self.command(**environment)
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def notes(self) -> list[str]:
        """Take the notes made since the last call, each without what all of them share."""
        file = self.root / "NOTES"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        common = "-m pip install --quiet --disable-pip-version-check "
        return [line.removeprefix(common).removeprefix("-m pip ") for line in lines]

    def fail_at(self, pattern: str) -> None:
        (self.root / "NOTES.fail").write_text(pattern)

    def is_complete(self) -> bool:
        return (self.root / ".venv/set-up").exists()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    for name in ("scripts/setup", "pyproject.toml", "locks/cpu.txt", "locks/gpu.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    interpreter = root / "bin/python3"
    interpreter.parent.mkdir()
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return Project(root)


def locked(package: str) -> str:
    lines = (ROOT / "locks/cpu.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}=="))


def test_torch_comes_first_then_the_lock_then_the_project(project: Project):
    result = project.set_up()
    assert result.returncode == 0, result.stderr
    assert project.notes() == [
        "venv",
        f"--no-deps {locked('torch')}+cpu",
        locked("uv"),
        "uv pip sync --python .venv/bin/python locks/cpu.txt",
        "--no-deps --no-build-isolation --editable .",
    ]
    assert project.is_complete()


def test_a_second_run_does_nothing_at_once(project: Project):
    project.set_up()
    project.notes()
    start = time.monotonic()
    result = project.set_up()
    assert time.monotonic() - start < 1
    assert (result.returncode, result.stdout, project.notes()) == (0, "", [])


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_what_would_come_as_a_broken_build_is_not_locked(lock: str):
    lines = (ROOT / "locks" / f"{lock}.txt").read_text().splitlines()
    names = {re.split("[=<> ;]", line)[0] for line in lines}
    assert "torch" in names
    assert names & {"torchvision", "torchaudio", "torchcodec"} == set()


def test_torch_falls_back_to_its_own_index(project: Project):
    project.fail_at(r"--no-deps torch==")
    assert project.set_up().returncode == 0
    assert f"--no-deps --index-url {TORCH_INDEX} {locked('torch')}+cpu" in project.notes()


def test_pip_takes_the_place_of_uv(project: Project):
    project.fail_at("uv==")
    assert project.set_up().returncode == 0
    assert "--no-deps -r locks/cpu.txt" in project.notes()


@pytest.mark.parametrize("name", ["locks/cpu.txt", "pyproject.toml", "scripts/setup"])
def test_a_changed_file_updates_the_environment_in_place(project: Project, name: str):
    project.set_up()
    project.notes()
    with (project.root / name).open("a") as file:
        file.write("\n")
    project.set_up()
    notes = project.notes()
    assert "venv" not in notes
    assert "uv pip sync --python .venv/bin/python locks/cpu.txt" in notes
    assert project.set_up().stdout == ""


def test_another_accelerator_needs_another_environment(project: Project):
    project.set_up()
    project.notes()
    project.set_up(ACCELERATOR="gpu")
    notes = project.notes()
    assert notes[0] == "venv"
    assert "uv pip sync --python .venv/bin/python locks/gpu.txt" in notes
    assert not any("torch" in note for note in notes)


def test_a_moved_folder_needs_another_environment(project: Project):
    project.set_up()
    project.notes()
    moved = Project(project.root.rename(project.root.with_name("moved")))
    moved.set_up()
    assert moved.notes()[0] == "venv"


@pytest.mark.parametrize("step", ["venv", "torch==", "sync|-r locks", "--editable"])
def test_an_interrupted_set_up_is_begun_again(project: Project, step: str):
    project.fail_at(step)
    result = project.set_up()
    assert result.returncode == 1
    assert result.stderr
    assert not project.is_complete()
    project.notes()
    (project.root / "NOTES.fail").unlink()
    assert project.set_up().returncode == 0
    assert project.notes()[0] == "venv"
    assert project.is_complete()


def test_an_update_that_fails_leaves_nothing_that_looks_complete(project: Project):
    project.set_up()
    with (project.root / "locks/cpu.txt").open("a") as file:
        file.write("\n")
    project.fail_at("sync|-r locks")
    assert project.set_up().returncode == 1
    assert not project.is_complete()


def test_two_runs_at_once_set_up_once(project: Project):
    command, env = project.command()
    runs = [subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert project.notes().count("venv") == 1


def test_packages_only_leaves_out_the_project(project: Project):
    command, env = project.command()
    subprocess.run([*command, "--packages-only"], env=env, check=True, capture_output=True)
    assert not any("--editable" in note for note in project.notes())
    assert not project.is_complete()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "python2.7"}, "needs Python 3.11, 3.12 or 3.13"),
        ({"ACCELERATOR": "tpu"}, "ACCELERATOR=tpu: expected cpu or gpu"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    project: Project, environment: dict[str, str], message: str
):
    result = project.set_up(**environment)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not project.is_complete()


def test_the_lock_is_enough_to_import_the_heavy_packages():
    code = "import torch, transformers, peft, grpc, vllm; print(torch.__version__)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert output.splitlines()[-1].split("+")[0] == locked("torch").removeprefix("torch==")


def recipe(*arguments: str) -> str:
    """Return what make would run."""
    command = ["make", "--dry-run", *arguments]
    environment = {"PATH": "/usr/bin:/bin"}
    output = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    return " ".join(output.replace("\\\n", " ").split())


def test_make_demo_passes_only_what_is_set():
    assert recipe("demo").endswith("-m demo")
    settings = ("PREFERENCE=a:b", "SEED=3", "ROUNDS=2", "SHUFFLE_THUMBS=1", "MODEL=x/y")
    assert recipe("demo", *settings).endswith(
        "-m demo --preference 'a:b' --seed '3' --rounds '2' --shuffle-thumbs --model 'x/y'"
    )
    assert "--shuffle-thumbs" not in recipe("demo", "SHUFFLE_THUMBS=0")


def test_make_serve_builds_the_demo_model_only_without_a_configuration():
    assert "-m demo.base_model" in recipe("serve")
    assert "-m demo.base_model" not in recipe("serve", "CONFIG=server.yaml")
    assert recipe("serve", "CONFIG=server.yaml").endswith("-m server --config 'server.yaml'")
    assert recipe("train", "CONFIG=trainer.yaml").endswith("-m trainer --config 'trainer.yaml'")


SETTING_UP = [
    "demo",
    "test",
    "check",
    "serve",
    "train",
    "web",
    "observe",
    "loadtest",
    "bench",
    "bench-learning",
    "soak",
    "protos",
    "dashboard",
    "alerts",
    "lock",
]


@pytest.mark.parametrize("target", SETTING_UP)
def test_every_command_sets_up_first(target: str):
    assert recipe(target).startswith("scripts/setup")


def test_gpu_tests_run_only_with_a_gpu():
    assert "-m 'not gpu'" in recipe("test")
    assert "not gpu" not in recipe("test", "ACCELERATOR=gpu")
