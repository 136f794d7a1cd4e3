"""The second tab: how versions are liked, which there are, and what was decided about them. Wiring."""

import asyncio
from typing import Any

import gradio as gr

from thumbloop.client import AsyncClient
from thumbloop.errors import ThumbloopError
from thumbloop.operating import COLUMNS, row_of
from web import figures
from web.refusals import in_words
from web.tables import notice, table
from web.versions import COURSE, DECISIONS, LIKINGS, course_rows, decision_rows, liking_rows

_MOST_VERSIONS = 20
_MOST_ASKED = 8
_MOST_DECISIONS = 20


class Overview:
    """The tab's components; they are read anew whenever somebody looks."""

    def __init__(self, client: AsyncClient, metrics: str) -> None:
        self._client = client
        self._metrics = metrics
        self._note = gr.HTML(elem_id="note", padding=False)
        self._likings = gr.HTML(elem_id="likings", padding=False)
        self._course = gr.HTML(elem_id="course", padding=False)
        self._versions = gr.HTML(elem_id="versions", padding=False)
        self._decisions = gr.HTML(elem_id="decisions", padding=False)
        self._refresh = gr.Button("Refresh", elem_id="refresh")

    def shown_by(self, tab: gr.Tab) -> None:
        """Read everything when the tab is opened, and when somebody asks for it."""
        outputs: list[Any] = [self._note, self._likings, self._course]
        outputs += [self._versions, self._decisions]
        for event in (tab.select, self._refresh.click):
            event(self._read, None, outputs, show_progress="hidden", api_visibility="private")

    async def _read(self) -> dict[Any, Any]:
        try:
            listed = (await self._client.versions()).policy_versions[:_MOST_VERSIONS]
            numbers = [version.policy_version for version in listed[:_MOST_ASKED]]
            found = await asyncio.gather(*(self._client.version(number) for number in numbers))
        except ThumbloopError as error:
            return {**await self._read_likings(), self._note: notice(in_words(error))}
        decisions = decision_rows(found, _MOST_DECISIONS)
        return {
            **await self._read_likings(),
            self._course: table("Over time", COURSE, course_rows(listed)),
            self._versions: table("Versions", COLUMNS, [row_of(one) for one in listed]),
            self._decisions: table("Recent decisions", DECISIONS, decisions),
        }

    async def _read_likings(self) -> dict[Any, Any]:
        try:
            likings = await figures.read(self._metrics)
        except ThumbloopError:
            words = f"The server's metrics cannot be read at {self._metrics}: how versions are liked is not known."
            return {self._note: notice(words), self._likings: ""}
        rows = liking_rows(likings)
        return {self._note: notice(""), self._likings: table("How they are liked", LIKINGS, rows)}
