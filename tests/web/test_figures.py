"""What is read from the server's metrics."""

import socket
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.by_version import ByVersion
from tests.serving import running
from thumbloop.config import State
from thumbloop.errors import Unavailable
from web.figures import Liking, likings_in, read
from web.tables import Share


def test_the_share_of_each_version_is_a_mean():
    registry = CollectorRegistry()
    heard = ByVersion(registry)
    for is_up in (True, True, False, True):
        heard.observe_thumb(2, is_up=is_up)
    heard.observe_reward(2, 0.0)
    heard.observe_reward(10, 0.0)
    assert likings_in(generate_latest(registry).decode()) == [
        Liking(2, Share(0.75, 4), Share(0.5, 1)),
        Liking(10, None, Share(0.5, 1)),
    ]


async def test_a_server_shows_its_thumbs(tiny_model: Path, state: State):
    async with running(tiny_model, state) as server:
        reply = await server.client.generate("Hello")
        await server.client.rate(reply.response_id, up=True)
        likings = await read(f"127.0.0.1:{server.application.metrics_port}")
    assert likings == [Liking(0, Share(1.0, 1), None)]


async def test_where_there_are_no_metrics_it_says_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"no metrics at {address}"):
            await read(address)
