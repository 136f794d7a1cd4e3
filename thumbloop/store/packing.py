"""Token ids and log-probabilities as bytes: little-endian, four bytes each."""

import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T", int, float)


def pack_ids(values: Sequence[int]) -> bytes:
    """Return int32 values as bytes."""
    return _little_endian(array("i", values)).tobytes()


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """Return the int32 values of `pack_ids`."""
    values = array("i")
    values.frombytes(data)
    return tuple(_little_endian(values))


def pack_floats(values: Sequence[float]) -> bytes:
    """Return values as float32 bytes."""
    return _little_endian(array("f", values)).tobytes()


def unpack_floats(data: bytes) -> tuple[float, ...]:
    """Return the float32 values of `pack_floats`."""
    values = array("f")
    values.frombytes(data)
    return tuple(_little_endian(values))


def _little_endian(values: "array[T]") -> "array[T]":
    if sys.byteorder == "big":
        values.byteswap()
    return values
