import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thumbloop.store.packing import pack_floats, pack_ids, unpack_floats, unpack_ids


def test_ids_are_four_bytes_each_lowest_first():
    assert pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"


def test_floats_are_four_bytes_each_lowest_first():
    assert pack_floats([1.0, -0.5]) == struct.pack("<2f", 1.0, -0.5)


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_ids_come_back_as_they_were(ids: list[int]):
    assert unpack_ids(pack_ids(ids)) == tuple(ids)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_float32_values_come_back_as_they_were(values: list[float]):
    assert unpack_floats(pack_floats(values)) == tuple(values)


@given(st.lists(st.floats(-1e3, 0)))
def test_other_floats_come_back_to_float32_precision(values: list[float]):
    assert unpack_floats(pack_floats(values)) == pytest.approx(values, rel=1e-6, abs=1e-30)
