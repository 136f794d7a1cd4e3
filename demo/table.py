"""The live table in the terminal: a row a version."""

from typing import Any

from rich.box import SIMPLE
from rich.table import Table

_COLUMNS = ("version", "after", "thumbs", "policy alone", "95 %", "shown", "AUROC", "KL", "tokens")


def versions_table(rows: list[dict[str, Any]], *, caption: str) -> Table:
    """Return the versions so far as a table."""
    table = Table(caption=caption, caption_justify="left", box=SIMPLE)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        interval = row["policy_thumb_up_rate_ci"]
        table.add_row(
            f"{row['policy_version']} {'●' if row['state'] == 'current' else ' '}",
            f"{row['published_s']:.0f} s",
            str(row["thumbs_so_far"]),
            _share(row["policy_thumb_up_rate"]),
            f"{interval[0]:.2f}–{interval[1]:.2f}" if interval else "…",
            _share(row["served_thumb_up_rate"]),
            _number(row["reward_model_auroc"]),
            _number(row["kl_to_reference"]),
            _number(row["mean_reply_tokens"], digits=0),
        )
    return table


def _share(value: float | None) -> str:
    return "…" if value is None else f"{value:.0%}"


def _number(value: float | None, *, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
