"""Records as Parquet: the columns of each shape. pyarrow is imported where it is needed, as JSON Lines do without it."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from thumbloop.errors import BadDataFile
from thumbloop.exchange.shapes import Record, Shape

_ROWS = 1000
"""Rows that are held at a time, and written as one group."""


def require() -> None:
    """Raise BadDataFile: pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise BadDataFile(
            "Parquet needs pyarrow: pip install '.[data]' in a checkout; .jsonl needs nothing"
        ) from None


def write(path: Path, shape: Shape, records: Iterable[Record]) -> int:
    """Write records into a new file, compressed; return how many there were. Raises OSError."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    rows = iter(records)
    first = next(rows, None)
    schema = _schema(pa, shape, first or {})
    count = 0
    with ParquetWriter(path, schema, compression="zstd") as writer:
        rows = rows if first is None else chain([first], rows)
        while batch := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def read(path: Path) -> Iterator[Record]:
    """Yield the rows of a file, a batch of them in memory. Raises BadDataFile, OSError."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise BadDataFile(f"{path} is no Parquet file: {error}") from None


def _schema(pa: Any, shape: Shape, like: Record) -> Any:
    """Return the columns of a shape; a record says whether its prompts are conversations, and what else it has."""
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    if shape is Shape.ROLLOUTS:
        columns = _rollouts(pa, turns)
    else:
        said = turns if isinstance(like.get("prompt"), list) else pa.string()
        replies = ("completion",) if shape is Shape.KTO else ("chosen", "rejected")
        columns = dict.fromkeys(("prompt", *replies), said)
        if shape is Shape.KTO:
            columns["label"] = pa.bool_()
    columns |= {
        name: pa.int64() if name == "policy_version" else pa.string()
        for name in like
        if name not in columns
    }
    return pa.schema(columns)


def _rollouts(pa: Any, turns: Any) -> dict[str, Any]:
    number, whole = pa.float64(), pa.int64()
    sampling = {
        "max_tokens": whole,
        "temperature": number,
        "top_p": number,
        "top_k": whole,
        "seed": pa.uint64(),
        "stop": pa.list_(pa.string()),
    }
    candidate = {
        "index": whole,
        "policy_version": whole,
        "chosen": pa.bool_(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "reward": number,
        "reward_components": pa.list_(pa.struct({"name": pa.string(), "value": number})),
        "stage_rewards": pa.list_(number),
        "propensity": number,
    }
    return {
        "response_id": pa.string(),
        "policy_version": whole,
        "created_at": pa.string(),
        "text": pa.string(),
        "messages": turns,
        "prompt_token_ids": pa.list_(pa.int32()),
        "sampling": pa.struct(sampling),
        "strategy": pa.string(),
        "arm": pa.string(),
        "reranked": pa.bool_(),
        "trainable": pa.bool_(),
        "untrainable_reason": pa.string(),
        "thumb": pa.bool_(),
        "preferences": pa.list_(pa.struct({"better": whole, "worse": whole})),
        "candidates": pa.list_(pa.struct(candidate)),
    }
