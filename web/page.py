"""The whole page: two tabs, how they look, and how they are served."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from thumbloop.client import AsyncClient
from web.chat import Chat
from web.overview import Overview

_STYLE = Path(__file__).with_name("page.css")
_LEFT_S = 15.0
"""How long at most what keeps a page's stream open outlives the page."""
_FONTS = ("system-ui", "sans-serif")  # the machine's own: nothing is loaded from elsewhere


THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")
"""What a browser may call this machine: a page whose name was made to mean it is another site."""


def application(client: AsyncClient, metrics: str, hosts: Sequence[str] = THIS_MACHINE) -> FastAPI:
    """Return the page as an application; it asks the server, and its metrics at host:port, and nobody else.

    Requests to other `hosts` than these are refused; "*" lets all in.
    """
    with gr.Blocks(title="Thumbloop", analytics_enabled=False) as page:
        with gr.Tab("Chat"):
            chat = Chat(client)
        with gr.Tab("Versions") as versions:
            overview = Overview(client, metrics)
        overview.shown_by(versions)
        page.load(_stay, None, None, show_progress="hidden", api_visibility="private")
        chat.opens_with(page)
    page.queue(default_concurrency_limit=None)  # nobody waits for another's reply
    whole = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    whole.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    mounted: FastAPI = gr.mount_gradio_app(
        whole,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Soft(font=_FONTS, font_mono=("ui-monospace", "monospace")),
        css_paths=_STYLE,
    )
    return mounted


async def _stay() -> AsyncIterator[None]:
    """Stay under way for as long as a page is open, so that Gradio keeps its stream of events open, too.

    It closes the stream whenever nothing is under way, and a page that begins something in the moments before it hears
    of that never hears what came of it: that button or box does nothing from then on.
    """
    while True:
        await asyncio.sleep(_LEFT_S)
        yield
