"""Rows of words as tables of a page. Everything that comes in is text, and is escaped here."""

import html
from collections.abc import Sequence
from typing import NamedTuple

_NONE = "None yet."


class Share(NamedTuple):
    """A cell with a number in [0, 1], the mean of so many others: a bar, and the same in words."""

    share: float
    of: int


Cell = str | Share
Row = Sequence[Cell]


def table(title: str, head: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table with its title, which scrolls by itself where it is too wide."""
    if not rows:
        return f"<div class=wide><h2>{html.escape(title)}</h2><p>{_NONE}</p></div>"
    names = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{_cell(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class=wide tabindex=0 role=region aria-label="{html.escape(title)}">'
        f"<h2>{html.escape(title)}</h2>"
        f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    return (
        f'<span class=bar><i style="width: {cell.share:.0%}"></i></span>'
        f"{cell.share:.0%} of {cell.of}"
    )


def notice(words: str) -> str:
    """Return what is said aloud, too, where somebody listens to the page."""
    return f'<p role="status">{html.escape(words)}</p>'
