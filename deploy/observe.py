"""python -m deploy.observe: starts Prometheus, with our rules, beside a server and a trainer that run here."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
import yaml

from deploy.panels import ROWS

RULES = Path(__file__).parent / "prometheus" / "rules.yml"
_SERVER, _TRAINER = "127.0.0.1:9464", "127.0.0.1:9465"
_PORT = r"metrics on (\d+)"
_TIMEOUT_S = 1.0
_MAIN = (
    "Thumbs up, by version",
    "Versions",
    "Calls",
    "Time of a reply",
    "Divergence from the base model",
)
"""What of the dashboard Prometheus shows by itself."""
_WINDOW = "15m"


def configuration(targets: Mapping[str, str], *, interval_s: int) -> dict[str, Any]:
    """Return prometheus.yml: an address to scrape for each job, and our rules."""
    return {
        "global": {"scrape_interval": f"{interval_s}s", "evaluation_interval": f"{interval_s}s"},
        "rule_files": [str(RULES.resolve())],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]}
            for job, address in targets.items()
        ],
    }


def command(
    folder: Path, address: str, targets: Mapping[str, str], *, interval_s: int
) -> list[str]:
    """Write the configuration into a folder; return how Prometheus is started with it, data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.yml"
    config.write_text(
        yaml.safe_dump(configuration(targets, interval_s=interval_s), sort_keys=False)
    )
    return [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]


def main_graphs(address: str) -> str:
    """Return where a Prometheus shows the main charts, one below the other: for a first look without Grafana."""
    charts = {chart.title: chart for row in ROWS.values() for chart in row}
    queries = [query for title in _MAIN for query in charts[title].queries.values()]
    words: dict[str, str] = {}
    for number, query in enumerate(queries):
        words[f"g{number}.expr"] = query.replace("$__rate_interval", "1m")
        words[f"g{number}.tab"] = "0"  # the graph, not the table
        words[f"g{number}.range_input"] = _WINDOW
    return f"http://{address}/graph?{urlencode(words)}"


def targets_of(demo: Path) -> dict[str, str]:
    """Return where server and trainer show their metrics: those of a demo that runs, or the settings' defaults."""
    return {
        f"thumbloop-{name}": _said_in(demo / f"{name}.log") or default
        for name, default in (("server", _SERVER), ("trainer", _TRAINER))
    }


def _said_in(log: Path) -> str | None:
    said = re.search(_PORT, log.read_text(errors="replace")) if log.is_file() else None
    address = f"127.0.0.1:{said[1]}" if said else ""
    return address if address and answers(address) else None


def answers(address: str) -> bool:
    """Say whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def main(
    server: Annotated[str | None, typer.Option(help="host:port of the server's metrics.")] = None,
    trainer: Annotated[str | None, typer.Option(help="host:port of the trainer's.")] = None,
    demo: Annotated[Path, typer.Option(help="A run of the demo, whose ports count.")] = Path(
        "runs/demo"
    ),
    folder: Annotated[Path, typer.Option(help="Where Prometheus keeps its data.")] = Path(
        "runs/observe"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it is looked at.")] = 9090,
    interval_s: Annotated[int, typer.Option(min=1, help="Seconds between two scrapes.")] = 5,
) -> None:
    """Watch a server and a trainer: graphs and alerts in a browser."""
    if shutil.which("prometheus") is None:
        print("error: there is no prometheus here; scripts/packages prometheus", file=sys.stderr)
        raise SystemExit(2)
    targets = targets_of(demo)
    for name, given in (("thumbloop-server", server), ("thumbloop-trainer", trainer)):
        targets[name] = given or targets[name]
    address = f"127.0.0.1:{port}"
    words = command(folder, address, targets, interval_s=interval_s)
    page = folder / "graphs.html"
    page.write_text(
        f'<meta http-equiv="refresh" content="0; url={escape(main_graphs(address))}">\n'
    )
    print(
        f"http://{address} has graphs and alerts of {' and '.join(targets.values())}; Ctrl-C ends it\n"
        f"the main graphs on one page: {page.resolve().as_uri()}",
        flush=True,
    )
    for target in targets.values():
        if not answers(target):
            print(f"nothing answers on {target} yet", flush=True)
    os.execvp(words[0], words)


if __name__ == "__main__":
    typer.run(main)
