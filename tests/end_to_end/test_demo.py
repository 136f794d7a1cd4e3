"""The whole loop as users run it: real vLLM, real trainer, real store, simulated people.

Slow by nature (minutes); the base model is built once and kept in the demo's own cache.
"""

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from deploy.observe import targets_of
from tests.prometheus import Query, complaints, prometheus, queries
from thumbloop.config import State
from thumbloop.store import feedback, open_store, reading

ROOT = Path(__file__).parents[2]
MARGIN = 0.10
FIELDS = {
    "seed",
    "preference",
    "shuffled_thumbs",
    "versions",
    "requests",
    "feedback",
    "swaps",
    "feedback_to_served_s",
    "tokens",
    "sampler_trainer_kl",
    "peak_memory_mib",
    "wall_s",
}
SECTIONS = {
    "requests": {"total", "failed"},
    "feedback": {"sent", "stored", "lost", "duplicated", "discarded"},
    "feedback_to_served_s": {"p50", "p95"},
    "tokens": {"served", "evaluation", "generated_for_training_only"},
}
VERSION_FIELDS = {
    "policy_version",
    "policy_thumb_up_rate",
    "policy_thumb_up_rate_ci",
    "served_thumb_up_rate",
    "reward_model_auroc",
    "kl_to_reference",
    "mean_reply_tokens",
    "well_formed_share",
    "thumbs_so_far",
    "feedback_used",
}


def demo(folder: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "demo", "--folder", str(folder), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """Undo what a shell does to its background jobs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_demo(folder: Path, *options: str) -> dict:
    process = demo(folder, *options)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def base_model():
    """Build the base model before any clock of a test runs."""
    subprocess.run(
        [sys.executable, "-m", "demo.base_model"], cwd=ROOT, check=True, capture_output=True
    )


@dataclass
class Watch:
    """What an operator sees of a run: lines of the dashboard without data so far, alerts, complaints."""

    without_data: set[Query] = field(default_factory=queries)
    fired: set[str] = field(default_factory=set)
    broken_rules: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    error: Exception | None = None

    def look(self, folder: Path, data: Path, ended: threading.Event) -> None:
        """Watch until the run ends, or until nothing is left to be seen."""
        logs = [folder / f"{name}.log" for name in ("server", "trainer")]
        while not all(log.is_file() and "metrics on" in log.read_text() for log in logs):
            if ended.wait(1):
                return
        targets = targets_of(folder)
        with prometheus(data, targets) as watching:
            while self.without_data:
                if ended.wait(5):
                    return
                self.without_data = watching.without_data(self.without_data)
                self.fired |= watching.firing()
            self.broken_rules = watching.broken_rules()
            self.complaints = [c for a in targets.values() for c in complaints(page_of(a))]


def page_of(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as page:
        return page.read().decode()


@contextmanager
def watched(folder: Path, data: Path) -> Iterator[Watch]:
    """Watch a run with Prometheus as long as the block lasts."""
    watch, ended = Watch(), threading.Event()

    def look() -> None:
        try:
            watch.look(folder, data, ended)
        except Exception as error:
            watch.error = error

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


@pytest.mark.timeout(1200)
def test_the_policy_learns_from_thumbs_while_it_serves(tmp_path):
    with watched(tmp_path / "run", tmp_path / "prometheus") as watch:
        report = run_demo(tmp_path / "run", "--rounds", "2", "--max-minutes", "10")
    examined = [v for v in report["versions"] if v["policy_thumb_up_rate"] is not None]
    first, last = examined[0], examined[-1]
    assert last["policy_version"] >= 2
    assert last["policy_thumb_up_rate_ci"][0] > first["policy_thumb_up_rate_ci"][1]
    assert last["well_formed_share"] >= first["well_formed_share"] - 0.03
    assert last["guided_thumb_up_rate"] > last["policy_thumb_up_rate_ci"][0]
    assert set(report) >= FIELDS
    assert all(set(version) >= VERSION_FIELDS for version in report["versions"])
    assert report["versions"][1]["published_s"] < 180
    assert report["peak_memory_mib"] < 6 * 1024
    assert report["feedback_to_served_s"]["p50"] > 0
    assert report["requests"]["failed"] == 0, report["failures"]
    assert report["feedback"]["lost"] == report["feedback"]["duplicated"] == 0
    assert report["tokens"]["generated_for_training_only"] == 0
    assert report["sampler_trainer_kl"] < 1e-3
    assert all(swap["requests_failed"] == 0 for swap in report["swaps"])
    assert [swap["policy_version"] for swap in report["swaps"]] == [1, 2]
    assert all(set(report[name]) >= fields for name, fields in SECTIONS.items())
    assert (tmp_path / "run" / "learning.png").stat().st_size > 10_000
    assert watch == Watch(without_data=set())


@pytest.mark.timeout(900)
def test_shuffled_thumbs_teach_nothing(tmp_path):
    report = run_demo(tmp_path / "run", "--shuffle-thumbs", "--rounds", "2", "--max-minutes", "1.5")
    rates = [v["policy_thumb_up_rate"] for v in report["versions"]]
    examined = [rate for rate in rates if rate is not None]
    assert report["feedback"]["stored"] > 80, (
        "too few thumbs for a round: the control proves nothing"
    )
    assert report["rounds"], "no round was run"
    published = [row for row in report["rounds"] if row["version"] is not None]
    assert published or all("auroc" in row["reason"] for row in report["rounds"])
    assert abs(examined[-1] - examined[0]) < MARGIN


@pytest.mark.timeout(300)
def test_an_interrupt_stops_everything_and_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    process = demo(folder)
    try:
        wait_for_thumbs(folder, 3)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    with reading(open_store(State(folder=folder / "state"))) as connection:
        assert feedback.counts(connection)[1] >= 3


def wait_for_thumbs(folder: Path, count: int) -> None:
    database = folder / "state" / "thumbloop.db"
    while not database.exists():
        time.sleep(0.2)
    engine = open_store(State(folder=folder / "state"))
    while True:
        with reading(engine) as connection:
            if feedback.counts(connection)[1] >= count:
                engine.dispose()
                return
        time.sleep(0.5)
