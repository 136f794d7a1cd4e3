"""Replies as they come, async and sync."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from thumbloop.statuses import error_of
from thumbloop.v1 import policy_pb2


class AsyncReplyStream:
    """A reply as it comes: iterate over its text, and then look at `reply`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.reply: policy_pb2.GenerateResponse | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for event in self._call:
                if event.HasField("response"):
                    self.reply = event.response
                else:
                    yield event.text_delta
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from failed
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Give it up; the server stops at once."""
        self._call.cancel()


class ReplyStream:
    """A reply as it comes; see AsyncReplyStream."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.reply: policy_pb2.GenerateResponse | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for event in self._call:
                if event.HasField("response"):
                    self.reply = event.response
                else:
                    yield event.text_delta
        except grpc.RpcError as failed:
            raise error_of(failed) from failed
        finally:
            self._call.cancel()

    def cancel(self) -> None:
        """Give it up; the server stops at once."""
        self._call.cancel()
