"""What is left of somebody in a folder of files, and readers who keep a database busy."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, func, select

from thumbloop.store import reading
from thumbloop.store.schema import interactions


def found(folder: Path, *words: str) -> list[str]:
    """Return in which files of a folder any of these words are.

    Another process looks: SQLite's locks of this one go when it closes a file of the store.
    """
    command = ["grep", "-rlaF", "-e", "\n".join(words), "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return sorted(Path(line).name for line in done.stdout.splitlines())


@contextmanager
def readers(store: Engine, many: int, seconds: float) -> Iterator[list[int]]:
    """Read all the time, in transactions of that many seconds, of which there is always one; count them."""
    done, reads = threading.Event(), [0]

    def read(rest: float) -> None:
        done.wait(rest)
        while not done.is_set():
            with reading(store) as connection:
                connection.scalar(select(func.count()).select_from(interactions))
                done.wait(seconds)
                connection.execute(select(interactions.c.prompt).limit(5)).all()
            reads[0] += 1

    threads = [threading.Thread(target=read, args=(seconds * i / many,)) for i in range(many)]
    for thread in threads:
        thread.start()
    try:
        yield reads
    finally:
        done.set()
        for thread in threads:
            thread.join()
