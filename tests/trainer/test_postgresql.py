"""A trainer whose store is in PostgreSQL."""

from pathlib import Path

from tests.bench import Bench
from tests.postgresql import Cluster
from thumbloop.config import State


def test_rounds_build_on_each_other(tmp_path: Path, tiny_model: Path, postgresql: Cluster):
    state = State(folder=tmp_path / "state", url=postgresql.new_database())
    bench = Bench(tmp_path, tiny_model, state=state)
    for number in (1, 2):
        bench.rate(40, version=number - 1)
        bench.prefer(4)
        assert bench.loop.step()
        bench.adopt(number)
        assert (bench.get(number).parent, bench.new_feedback(number)) == (number - 1, 0)
    bench.engine.dispose()
