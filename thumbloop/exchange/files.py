"""Files of records: JSON Lines, and Parquet where pyarrow is installed. Written whole or not at all, read a few at a time."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from thumbloop.errors import BadDataFile
from thumbloop.exchange import parquet
from thumbloop.exchange.shapes import Record, Shape
from thumbloop.folders import sync

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)


class Line(NamedTuple):
    """One record of a file, and where it stands, from 1; or what is wrong with it."""

    number: int
    record: Record | None
    problem: str = ""


def check_name(path: Path) -> None:
    """Raise BadDataFile: the name does not say what the file holds, or the library for it is not installed."""
    if path.suffix in PARQUET:
        parquet.require()
    elif path.suffix not in JSON_LINES:
        raise BadDataFile(f"{path}: the name has to end with .jsonl or .parquet")


@contextmanager
def replacing(path: Path, *, force: bool) -> Iterator[Path]:
    """Give the block a path beside this one; what it wrote there takes the place of this one, whole, or is removed.

    Raises BadDataFile: there is a file of this name, and `force` is not set; or it cannot be written.
    """
    _refuse_to_replace(path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            yield temporary
            sync(temporary)
            _refuse_to_replace(path, force=force)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise BadDataFile(f"{path} cannot be written: {error.strerror or error}") from None


def _refuse_to_replace(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise BadDataFile(f"{path} is a folder; name a file")
    if path.exists() and not force:
        raise BadDataFile(f"{path} is there already; --force replaces it")


def write(path: Path, like: Path, shape: Shape, records: Iterable[Record]) -> int:
    """Write records into a new file in the format that the name `like` says; return how many there were.

    Raises OSError.
    """
    if like.suffix in PARQUET:
        return parquet.write(path, shape, records)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def read(path: Path) -> Iterator[Line]:
    """Yield the records of a file, with those that are none. Raises BadDataFile: it cannot be read at all."""
    check_name(path)
    try:
        if path.suffix in PARQUET:
            for number, record in enumerate(parquet.read(path), start=1):
                yield Line(number, record)
        else:
            with path.open("rb") as file:
                yield from _json_lines(file)
    except OSError as error:
        raise BadDataFile(f"{path} cannot be read: {error.strerror or error}") from None


def _json_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _line(number, line)


def _line(number: int, line: bytes) -> Line:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        return Line(number, None, "is not UTF-8")
    except (ValueError, RecursionError) as error:
        return Line(number, None, f"is no JSON: {error}")
    if not isinstance(record, dict):
        return Line(number, None, "is no JSON object")
    return Line(number, record)
