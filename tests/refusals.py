"""Reading refusals: a call that has to fail, its status and its details."""

from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

M = TypeVar("M", bound=Message)


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """Await a call that has to be refused; return how."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


def detail_of(error: grpc.aio.AioRpcError, kind: type[M]) -> M:
    """Return the only detail of the status, which has to be of this kind."""
    status = rpc_status.from_call(error)
    assert status is not None
    (packed,) = status.details
    detail = kind()
    assert packed.Unpack(detail)
    return detail


def fields(error: grpc.aio.AioRpcError) -> list[str]:
    """Return which fields were wrong; each has to be described."""
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = detail_of(error, error_details_pb2.BadRequest).field_violations
    assert all(violation.description for violation in found)
    return [violation.field for violation in found]
