"""Debian's Prometheus: its linter, and itself as a process on loopback that scrapes every second."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.observe import command
from deploy.panels import TRIAL

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy/grafana/thumbloop.json"
_START_S = 30


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Prometheus' own checker."""
    assert shutil.which("promtool"), "promtool is missing: scripts/packages prometheus"
    return subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, check=False
    )


def complaints(metrics: str) -> list[str]:
    """Return what promtool has to say of a page of metrics, but of vLLM's, whose names hold a colon."""
    checked = promtool("check", "metrics", text=metrics)
    lines = (checked.stdout + checked.stderr).splitlines()
    return [line for line in lines if not line.startswith("vllm:")]


class Query(NamedTuple):
    """One line of the dashboard."""

    panel: str
    legend: str
    expression: str


def queries(*, of_trials: bool = False) -> set[Query]:
    """Return all queries of the dashboard as it is in the repository: of a trial, or all others."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {
        Query(
            panel["title"],
            target["legendFormat"],
            target["expr"].replace("$__rate_interval", "10s"),
        )
        for panel in panels
        for target in panel.get("targets", ())
        if (panel["title"] == TRIAL) == of_trials
    }


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[float]:
        """Return the values of all series, as they are now."""
        asked = urllib.parse.urlencode({"query": expression})
        return [float(series["value"][1]) for series in self._get(f"query?{asked}")["result"]]

    def without_data(self, asked: Collection[Query]) -> set[Query]:
        """Return the queries that give no number at all."""
        return {
            query
            for query in asked
            if all(value != value for value in self.query(query.expression))
        }

    def broken_rules(self) -> list[str]:
        """Return the rules that cannot be evaluated, with the reason."""
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        assert len(rules) > 20
        return [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] == "err"]

    def firing(self) -> set[str]:
        """Return the alerts that fire now."""
        alerts = self._get("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

    def is_ready(self) -> bool:
        try:
            return bool(self.query("vector(1)"))
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Start Prometheus on a free port, as `make observe` does, and stop it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command(folder, f"127.0.0.1:{port}", targets, interval_s=1)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        server, deadline = Prometheus(port), time.monotonic() + _START_S
        while not server.is_ready():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "Prometheus does not answer"
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(_START_S)
