"""Log lines of server and trainer, as text or JSON, each with what is known of the call that it is about.

Never with what users wrote: the messages of errors that are not ours may quote it, and are left out unless
`logging.content` asks for them.
"""

import io
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

from thumbloop.config.shared import Logging
from thumbloop.errors import ThumbloopError

OURS = ("server", "trainer", "thumbloop")
"""Loggers of ours; those of others speak from WARNING on."""

_ABOUT: ContextVar[dict[str, object] | None] = ContextVar("about", default=None)
_SAFE = (ThumbloopError, OSError)  # whose messages quote settings and paths, no prompts


def begin(**facts: object) -> None:
    """Let this task's lines, and those of tasks that it starts, say these facts beside their message."""
    _ABOUT.set(dict(facts))


def note(**facts: object) -> None:
    """Add facts to what has begun; where nothing has, there is nobody to say them."""
    if (about := _ABOUT.get()) is not None:
        about.update(facts)


def known() -> Mapping[str, object]:
    """Return the facts that lines say here."""
    return _ABOUT.get() or {}


class TextLines(logging.Formatter):
    """Lines for people: the time, the message, and the facts behind it."""

    def __init__(self, *, content: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._content = content

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line without a trace."""
        facts = " ".join(f"{name}={_word(value)}" for name, value in known().items())
        return super().formatMessage(record) + (f" [{facts}]" if facts else "")

    def formatException(self, ei: object) -> str:  # noqa: N802
        """Return a trace that quotes nobody."""
        return _trace(ei, self._content)


class JsonLines(logging.Formatter):
    """Lines for machines: an object each."""

    def __init__(self, *, content: bool = False) -> None:
        super().__init__()
        self._content = content

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **known(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["trace"] = _trace(record.exc_info, self._content)
        return json.dumps(said, ensure_ascii=False, default=str)


def configure(settings: Logging) -> None:
    """Send every line of this process to stderr, in the form that is wanted."""
    is_json = settings.format == "json"
    handler = logging.StreamHandler()
    handler.setFormatter((JsonLines if is_json else TextLines)(content=settings.content))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(is_json)  # Python's own would be lines of another form
    for name in OURS:
        logging.getLogger(name).setLevel(settings.level.upper())


class Progress(io.TextIOBase):
    """A file whose lines become lines of the log."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(name)

    def write(self, text: str) -> int:
        """Log each line that says something."""
        for line in text.splitlines():
            if said := line.strip():
                self._log.info(said)
        return len(text)


def say_error(words: str) -> None:
    """Say in one line why the process ends, in the form of all other lines where that is JSON."""
    handlers = logging.getLogger().handlers
    if any(isinstance(handler.formatter, JsonLines) for handler in handlers):
        logging.getLogger("thumbloop").critical(words)
    else:
        print(f"error: {words}", file=sys.stderr)


def _word(value: object) -> str:
    """Return a fact that neither ends a line nor passes for another: callers choose their ids."""
    word = str(value)
    return word if word.isascii() and word.isprintable() and " " not in word else json.dumps(word)


def _trace(raised: object, content: bool) -> str:
    """Return where an error comes from; what it says only where it is ours, or content is wanted."""
    assert isinstance(raised, tuple)
    lines: list[str] = []
    for error in _chain(raised[1]):
        kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        says = f": {error}" if content or isinstance(error, _SAFE) else ""
        lines = [*traceback.format_tb(error.__traceback__), f"{kind}{says}\n", *lines]
    return "".join(lines).rstrip("\n")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that led to it, as Python shows them; each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
