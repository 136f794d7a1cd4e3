"""Prometheus beside a server and a trainer."""

import re
import socket
from html import unescape
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from typer.testing import CliRunner

from deploy import observe
from tests.prometheus import promtool, queries

ROOT = Path(__file__).parents[2]
TARGETS = {"thumbloop-server": "127.0.0.1:9464", "thumbloop-trainer": "127.0.0.1:9465"}


def test_what_is_written_prometheus_can_read(tmp_path: Path):
    words = observe.command(tmp_path / "new", "127.0.0.1:9090", TARGETS, interval_s=5)
    config = tmp_path / "new/prometheus.yml"
    assert words[:2] == ["prometheus", f"--config.file={config}"]
    assert "--web.listen-address=127.0.0.1:9090" in words
    checked = promtool("check", "config", str(config))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    rules = sum(len(group["rules"]) for group in groups)
    assert f" {rules} rules found" in checked.stdout + checked.stderr
    jobs = yaml.safe_load(config.read_text())["scrape_configs"]
    assert {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs} == {
        name: [address] for name, address in TARGETS.items()
    }


def test_without_a_demo_the_ports_are_those_of_the_settings(tmp_path: Path):
    assert observe.targets_of(tmp_path) == TARGETS


def test_the_ports_of_a_demo_that_runs_are_found_in_its_logs(tmp_path: Path):
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = [each.getsockname()[1] for each in (one, two)]
        server = f"…\nserving on port 41, metrics on {ports[0]}, HTTP on 43\n"
        (tmp_path / "server.log").write_text(server)
        (tmp_path / "trainer.log").write_text(
            f"training on cpu, metrics on {ports[1]}\nround 1: …\n"
        )
        assert observe.targets_of(tmp_path) == {
            "thumbloop-server": f"127.0.0.1:{ports[0]}",
            "thumbloop-trainer": f"127.0.0.1:{ports[1]}",
        }
    assert observe.targets_of(tmp_path) == TARGETS  # it has ended


def test_the_command_says_where_to_look_and_becomes_prometheus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    become: list[list[str]] = []
    monkeypatch.setattr(observe.os, "execvp", lambda _name, words: become.append(words))
    arguments = ["--demo", str(tmp_path), "--folder", str(tmp_path / "o"), "--port", "9099"]
    app = observe.typer.Typer()
    app.command()(observe.main)
    done = CliRunner().invoke(app, [*arguments, "--trainer", "127.0.0.1:7"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("http://127.0.0.1:9099 has graphs and alerts of ")
    assert "127.0.0.1:9464 and 127.0.0.1:7" in done.output
    assert "nothing answers on 127.0.0.1:7 yet" in done.output
    page = tmp_path / "o/graphs.html"
    assert page.as_uri() in done.output
    url = re.search(r"url=([^\"]+)", page.read_text())
    assert url is not None
    assert unescape(url[1]) == observe.main_graphs("127.0.0.1:9099")
    (words,) = become
    assert words[0] == "prometheus"
    assert "127.0.0.1:7" in (tmp_path / "o/prometheus.yml").read_text()


def test_the_main_graphs_are_some_of_the_dashboards():
    shown = parse_qs(urlsplit(observe.main_graphs("127.0.0.1:9099")).query)
    asked = [shown[f"g{n}.expr"][0] for n in range(len(shown) // 3)]
    ours = {query.expression.replace("[10s]", "[1m]") for query in queries()}
    assert len(asked) == len(set(asked)) >= 8
    assert set(asked) <= ours
    assert "thumb_up" in asked[0]


def test_where_there_is_no_prometheus_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        observe.main(demo=tmp_path, folder=tmp_path)
    assert ended.value.code == 2
